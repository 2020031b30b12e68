"""Composition root of the telemetry service."""

from __future__ import annotations

from datetime import timedelta

from slmops.kit.bus.relay import run_relay
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal
from slmops.kit.main import errors_as_one_line
from slmops.kit.service import Service
from slmops.kit.settings import load
from slmops.telemetry.fleet import BusFleet
from slmops.telemetry.handlers import Handlers, routes
from slmops.telemetry.settings import Settings
from slmops.telemetry.store import MIGRATIONS, project, schema


def build(settings: Settings) -> Service:
    bus = Bus("telemetry", settings)
    journal = Journal(
        settings.database_url, service="telemetry", metadata=schema(), migrations=MIGRATIONS, project=project
    )
    window, grace = timedelta(seconds=settings.window_s), timedelta(seconds=settings.grace_s)
    handlers = Handlers(journal, BusFleet(lambda: bus.client), utc_now, window, grace)
    routes(bus, handlers)
    return Service(
        "telemetry",
        settings,
        bus,
        opening=[journal.open],
        tasks=[lambda: run_relay(journal, bus.client), handlers.run],
        closing=[journal.close],
        checks=[journal.problem],
    )


def main() -> None:
    with errors_as_one_line():
        build(load(Settings)).run()


if __name__ == "__main__":
    main()
