"""Every family of docs/architectures.md does what its row says."""

import importlib.util

import pytest
from architectures import FAMILIES, HEAD, PAGE, row

peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the rows speak of PEFT")


@peft
@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_of_the_page(family: str) -> None:
    assert row(family) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_no_other_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD) and len(text.splitlines()) == len(HEAD.splitlines()) + len(
        FAMILIES
    )
