"""Errors that are the user's to mend, shown as one line without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message names the key, its value and the choices."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
