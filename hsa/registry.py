"""diffusers' hook registry as a context manager that leaves nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn


@contextmanager
def registered(module: nn.Module, hook: ModelHook, name: str) -> Iterator[ModelHook]:
    """Register `hook` on `module` for the length of the block.

    `HookRegistry.remove_hook` leaves the bound original `forward` in the instance dictionary; it
    is taken out again, so that the module ends exactly as it began.

    Raises:
        ValueError: a hook of that name is registered already.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    pristine = "forward" not in vars(module)
    registry.register_hook(hook, name)
    try:
        yield hook
    finally:
        registry.remove_hook(name, recurse=False)
        if pristine and not registry.hooks:
            del module.forward
