"""Measurements of a gateway that was revoked, removed or moved count in no window from then on."""

from __future__ import annotations

from typing import Any, cast

import pytest
from unit.telemetry.test_telemetry_windows import KEY, Telemetry, at, batch, telemetry

from slmops.contracts.errors import Denied
from slmops.contracts.events import Event, GatewayEnrolled, GatewayRemoved, GatewayRevoked
from slmops.kit.bus.batches import Received
from slmops.telemetry import store

__all__ = ["telemetry"]
OTHER = "U" + "B" * 55
REVOKED = GatewayRevoked(gateway_id="gw-1", public_key=KEY, revoked_at=at(3))


def enrolled(key: str, seconds: float, blueprint: str = "edge-chat", moved_from: str | None = None) -> GatewayEnrolled:
    return GatewayEnrolled(
        gateway_id="gw-1", blueprint=blueprint, public_key=key, moved_from=moved_from, at=at(seconds)
    )


async def hear(telemetry: Telemetry, *events: Event) -> None:
    for event in events:
        if isinstance(event, GatewayEnrolled):
            await telemetry.handlers.on_enrolments([Received(event, cast(Any, None))])
        else:
            await telemetry.handlers.on_fact(event, cast(Any, None))


async def test_a_revoked_gateway_leaves_the_open_window_and_is_refused(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("a", 1), batch("b", 1, "gw-2"))
    await hear(telemetry, REVOKED)
    with pytest.raises(Denied, match="gw-1 was revoked"):
        await telemetry.receive(batch("c", 4))
    [window] = await telemetry.closed(6)
    assert (window.gateways, window.requests) == (1, 2)


async def test_it_stays_revoked_whatever_order_the_events_arrive_in(telemetry: Telemetry) -> None:
    await hear(telemetry, REVOKED, enrolled(KEY, 0))
    with pytest.raises(Denied, match="revoked"):
        await telemetry.receive(batch("a", 1))


@pytest.mark.parametrize("again", [enrolled(OTHER, 3.5), enrolled(KEY, 4)], ids=["another key", "its own key"])
async def test_it_counts_again_after_it_was_enrolled_again(telemetry: Telemetry, again: GatewayEnrolled) -> None:
    await hear(telemetry, enrolled(KEY, 0), again, REVOKED, enrolled(KEY, 0))
    await telemetry.receive(batch("a", 4))
    [window] = await telemetry.closed(6)
    assert window.gateways == 1


async def test_batches_from_before_a_move_are_dropped_without_a_dead_letter(telemetry: Telemetry) -> None:
    await hear(telemetry, enrolled(KEY, 0), enrolled(KEY, 2, "kiosk", "edge-chat"))
    await telemetry.receive(batch("a", 1), batch("b", 3, blueprint="kiosk"))
    [window] = await telemetry.closed(6)
    assert (window.blueprint, window.gateways) == ("kiosk", 1)


async def test_a_removed_gateway_is_forgotten_but_not_the_device_after_it(telemetry: Telemetry) -> None:
    gone = GatewayRemoved(gateway_id="gw-1", blueprint="edge-chat", at=at(3))
    await hear(telemetry, enrolled(KEY, 0), gone)
    assert await telemetry.journal.read(lambda c: store.member(c, "gw-1")) is None
    await hear(telemetry, enrolled(OTHER, 5), gone)
    assert await telemetry.journal.read(lambda c: store.member(c, "gw-1")) is not None


async def test_revocations_of_removed_gateways_are_not_kept_for_ever(telemetry: Telemetry) -> None:
    await hear(telemetry, enrolled(OTHER, 5), REVOKED, REVOKED.model_copy(update={"gateway_id": "gw-2"}))
    telemetry.now = at(31 * 24 * 3600)
    await telemetry.handlers.forget_old()
    left = await telemetry.journal.read(lambda c: c.execute(store._revoked.select()).all())
    assert [row.gateway_id for row in left] == ["gw-1"]
