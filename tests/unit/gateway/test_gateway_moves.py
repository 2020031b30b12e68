"""A gateway that is moved while a plan of its old blueprint is checked follows that plan no more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from pathlib import Path

import pytest
from trust_world import TrustWorld
from unit.gateway.test_gateway_bundles import Follower, OfflineGateway, bundle

from slmops.contracts import subjects
from slmops.contracts.errors import NotReady
from slmops.contracts.plan import Identity, Overlay, Plan
from slmops.contracts.tuf_names import Attack, refused
from slmops.gateway.install.authorization import Authorization
from slmops.gateway.twin import Twin

OLD = Identity(gateway_id="gw-1", blueprint="edge-chat")
NEW = Identity(gateway_id="gw-1", blueprint="kiosk")
PLAN, OVERLAY = subjects.blueprint_key(OLD.blueprint), subjects.overlay_key(OLD.gateway_id)


class Check:
    """The check of a plan: waits for `finish`, then returns a plan of the old blueprint or raises `error`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun, self.finish, self.error = asyncio.Event(), asyncio.Event(), error

    async def __call__(self, _data: bytes) -> Plan:
        self.begun.set()
        await self.finish.wait()
        if self.error is not None:
            raise self.error
        return Plan(blueprint=OLD.blueprint, generation=1)


async def moved_meanwhile(twin: Twin, check: Check, work: Coroutine[None, None, None]) -> None:
    running = asyncio.create_task(work)
    await check.begun.wait()
    twin.move_to(NEW)
    check.finish.set()
    await running


@pytest.mark.parametrize("error", [None, refused(Attack.MIX_AND_MATCH, "another", where="plan"), NotReady("moved")])
async def test_a_plan_that_was_checked_during_a_move_is_ignored(error: Exception | None) -> None:
    check, follower = Check(error), Follower()
    twin = Twin(OLD, check, follower, timedelta(hours=1))
    await moved_meanwhile(twin, check, twin._apply(PLAN, b"plan", 7))
    assert (follower.generations, follower.refusals) == ([], [])
    await twin._apply(OVERLAY, Overlay(gateway_id=OLD.gateway_id).model_dump_json().encode(), 8)
    assert follower.generations == [], "the old plan was not kept for the next overlay either"


async def test_a_plan_of_the_old_blueprint_that_arrives_after_a_move_is_not_even_checked() -> None:
    check, follower = Check(), Follower()
    check.finish.set()
    twin = Twin(OLD, check, follower, timedelta(hours=1))
    await twin._apply(PLAN, b"plan", 7)
    assert follower.generations == [1]
    twin.move_to(NEW)
    check.begun.clear()
    await twin._apply(PLAN, b"plan", 8)
    await twin.adopt(Plan(blueprint=OLD.blueprint, generation=9))
    assert not check.begun.is_set()
    assert follower.generations == [1]


async def test_the_trusted_plan_is_not_one_of_a_blueprint_that_the_gateway_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway is moved while the metadata is refreshed, and while the plan's generation is stored."""
    for number, step in enumerate(("_try_refresh", "_accept")):
        root = tmp_path / str(number)
        gateway = OfflineGateway(root, TrustWorld(root))
        trust, path = gateway.trust, bundle(gateway.world)
        made = getattr(trust, step)

        def moves(*arguments: object, made: Callable[..., object] = made, trust: Authorization = trust) -> object:
            trust.move_to(NEW)
            return made(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(trust, step, moves)
            path.rename(gateway.drop / path.name)
            await gateway.process_folder()
        assert gateway.follower.generations == []
        assert gateway.follower.refusals == [], "a move is no attack"
        assert trust._plan == b""
        assert gateway.bundles.source is None
