"""The command line with the rollout service's queries on a real bus and a fleet of 3,000 gateways."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from integration.console_cli import Cli
from integration.kit_world import world_on
from sqlalchemy import insert
from unit.rollout.rollout_examples import NAME, report

from slmops.contracts.commands import Attention
from slmops.contracts.errors import Problem
from slmops.contracts.events import GatewayEnrolled, UpdatePhase
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal, UnitOfWork
from slmops.rollout import inventory_rows, queries, store
from slmops.rollout.tables import GATEWAY_LABELS, GATEWAYS, SIGHTINGS

if TYPE_CHECKING:
    from servers import NatsServer

SIZE = 3000
FAILED = ["gw-0000", "gw-1000", "gw-2000"]
OFFLINE = 30


def rows(number: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns a gateway's row, its sighting and its label."""
    name, now, site = f"gw-{number:04}", utc_now(), f"site-{number % 10}"
    phase = UpdatePhase.FAILED if name in FAILED else UpdatePhase.COMMITTED
    problem = Problem(code="inference_failed", what="0 of 5 golden prompts pass") if name in FAILED else None
    event = report(name, phase, f"1.0.{number % 2}", 1, labels={"site": site}, problem=problem)
    enrolled = GatewayEnrolled(gateway_id=name, blueprint=NAME, public_key="U", labels={"site": site}, at=now)
    row = {
        "gateway_id": name,
        "blueprint": NAME,
        "enrolled": enrolled.model_dump_json(),
        "report": event.model_dump_json(),
        "sequence": 1,
        "standing": "enrolled",
        "labels": json.dumps({"site": site}),
        **inventory_rows.values_of(event),
    }
    seen = now - timedelta(days=1 if number % (SIZE // OFFLINE) == 7 else 0)
    sighting = {"gateway_id": name, "at": seen.timestamp(), "clock_ahead_s": 0.0}
    return row, sighting, {"gateway_id": name, "key": "site", "value": site}


@pytest.fixture
async def slmops(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Cli]:
    journal = Journal(
        f"sqlite:///{tmp_path}/j.db",
        service="rollout",
        metadata=store.schema(),
        migrations=store.MIGRATIONS,
        project=store.project,
    )
    await journal.open()

    def fill(unit: UnitOfWork) -> None:
        every = [rows(number) for number in range(SIZE)]
        for table, some in zip((GATEWAYS, SIGHTINGS, GATEWAY_LABELS), zip(*every, strict=True), strict=True):
            unit.connection.execute(insert(table), list(some))

    await journal.transact(fill)
    async with world_on(nats_server.url, nats_server.creds) as world:
        await world.service("rollout", lambda bus: queries.routes(bus, queries.Queries(journal, utc_now)))
        yield Cli(world)
    await journal.close()


async def test_a_large_fleet_is_listed_filtered_and_counted(slmops: Cli) -> None:
    short = await slmops("gateway", "ls")
    assert short.exit_code == 0
    assert "gw-0099" in short.out
    assert "gw-0100" not in short.out
    assert "100 of 3,000 gateways. Show more with --limit 3000" in short.err
    everyone = (await slmops("gateway", "ls", "--limit", "100000", "--json")).json
    assert [one["gateway_id"] for one in everyone["gateways"]] == [f"gw-{n:04}" for n in range(SIZE)]
    assert everyone["total"] == SIZE

    found = (await slmops("gateway", "ls", "--attention", "failed", "--json")).json
    assert [one["gateway_id"] for one in found["gateways"]] == FAILED
    by_many = ("--state", "committed", "--version", "1.0.1", "--label", "site=site-7", "--silent-for", "2h")
    found = (await slmops("gateway", "ls", "--json", *by_many)).json
    assert (found["total"], len(found["gateways"])) == (OFFLINE, OFFLINE)
    none = await slmops("gateway", "ls", "--label", "site=nowhere", "--blueprint", NAME)
    assert (none.exit_code, "No such gateways" in none.out, none.err) == (0, True, "")

    summary = (await slmops("fleet", "summary", "--json")).json
    assert (summary["gateways"], summary["offline"]) == (SIZE, OFFLINE)
    assert summary["version"]["counts"] == {"1.0.0": SIZE // 2 - 3, "1.0.1": SIZE // 2, "none": 3}
    assert summary["attention"]["counts"] == dict.fromkeys(Attention, 0) | {"failed": 3, "offline": OFFLINE}
    shown = await slmops("gateway", "show", "gw-1000")
    assert "with a failed update" in shown.out

    # The other services do not run here. The bus answers at once that nobody does.
    found = {item["kind"]: item["what"] for item in (await slmops("attention", "--json")).json}
    assert found["gateways_failed"] == "3 gateways with a failed update, for example gw-0000, gw-1000, gw-2000"
    assert found["gateways_offline"].startswith(f"{OFFLINE} gateways offline, for example gw-0007, gw-0107")
    assert "gateways_clock" not in found
    status = (await slmops("status", "--json")).json["fleet"]
    assert status["attention"]["counts"]["failed"] == len(FAILED)
