"""Cursors are read back as they were made, and anything else is refused."""

from __future__ import annotations

from base64 import urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.contracts.commands import GatewayRemoval
from slmops.contracts.errors import InvalidCursor, InvalidMessage
from slmops.kit.bus.pages import cursor, fitting, position


def encoded(text: str) -> str:
    return urlsafe_b64encode(text.encode()).decode()


@given(st.floats(-(2**53), 2**53), st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True))
def test_a_position_is_read_back(number: float, name: str) -> None:
    assert position("rollouts", cursor("rollouts", number, name), float, str) == (number, name)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "gw-1",
        "x" * 5000,
        "\N{LATIN SMALL LETTER E WITH ACUTE}",
        "====",
        cursor("users", "gw-1"),
        cursor("gateways", 7.0),
        cursor("gateways", "gw-1", "gw-2"),
        cursor("gateways"),
        encoded("{}"),
        encoded('["gateways", null]'),
        encoded('["gateways", "gw\\u00001"]'),
        encoded('["gateways", "\\ud800"]'),
        encoded("[" * 200),
        *(encoded(f'["gateways", {number}]') for number in ("NaN", "Infinity", "1e300", "7")),
    ],
)
def test_anything_else_is_refused(wrong: str) -> None:
    for kind in (str, float):
        if (kind, wrong) == (float, cursor("gateways", 7.0)):
            continue
        with pytest.raises(InvalidCursor, match="not one of this list") as refused:
            position("gateways", wrong, kind)
    assert refused.value.fix
    # An `InvalidMessage` would be dead-lettered, so that whoever may read could fill the stream of dead letters.
    assert not isinstance(refused.value, InvalidMessage)


def test_a_page_ends_before_the_item_that_does_not_fit_and_has_at_least_one() -> None:
    items = [GatewayRemoval(gateway_id=f"gw-{n}", blueprint="b", at="2026-01-01T00:00:00Z") for n in range(5)]  # type: ignore[arg-type]
    size = len(items[0].model_dump_json())
    assert fitting(items, 3 * size) == items[:3]
    assert fitting(items, 3 * size - 1) == items[:2]
    assert fitting(items, 1) == items[:1]
    assert fitting([], 1) == []
