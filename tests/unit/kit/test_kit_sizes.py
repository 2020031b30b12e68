"""Sizes are parsed and formatted in the same format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.contracts.errors import InvalidMessage
from slmops.kit.sizes import parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1B", 1), ("16KiB", 16 << 10), ("1.5 GiB", 3 << 29), ("2GiB", 2 << 30), ("1TiB", 1 << 40)],
)
def test_a_valid_size_is_parsed(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes
    assert parse_size(size_text(size_bytes)) == size_bytes


@pytest.mark.parametrize("text", ["", "2", "2GB", "-1GiB", "0GiB", "GiB", "2 gib", "1e3GiB", "2GiB more", "9000000TiB"])
def test_an_invalid_size_is_rejected(text: str) -> None:
    with pytest.raises(InvalidMessage, match="is not a size"):
        parse_size(text)


@given(st.integers(1, 1 << 50))
def test_a_formatted_size_can_be_parsed(size_bytes: int) -> None:
    assert parse_size(size_text(size_bytes)) == pytest.approx(size_bytes, rel=1e-3)
