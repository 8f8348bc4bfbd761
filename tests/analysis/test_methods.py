"""What methods say of themselves reaches the reader."""

from pathlib import Path

import pytest

from analysis import methods
from baselines.base import Method

SHIPPED = methods.shipped()
KINDS = {"native", "official-rule", "diffusers-hook", "cache-dit", "from-paper"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_method_says_whose_it_is(name):
    kind = type(SHIPPED[name])
    assert kind.implementation in KINDS and kind.paper and kind.source
    assert kind.__doc__ != Method.__doc__ and all(kind.deviations)


def test_the_page_is_what_the_classes_say():
    """Written by `python -m analysis.methods`."""
    assert Path("docs/methods.md").read_text(encoding="utf-8") == methods.page(SHIPPED)


def test_the_table_has_a_row_for_each_class():
    found = methods.table([SHIPPED[name] for name in ("hsa_25", "teacache", "hsa_50")])
    assert [row[0].text for row in found.rows] == ["HSA", "TeaCache"]
    assert "group fractions and protected windows are ours" in found.rows[0][-1].text
