"""Composition root of the access service."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from slmops.access import first_admin
from slmops.access.accounts import Accounts
from slmops.access.handlers import Handlers, routes
from slmops.access.settings import Settings
from slmops.access.store import MIGRATIONS, project, schema
from slmops.kit.bus.access_keys import AccessKeys
from slmops.kit.bus.relay import run_relay
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal
from slmops.kit.main import errors_as_one_line
from slmops.kit.service import Service
from slmops.kit.settings import load


def build(settings: Settings) -> Service:
    bus = Bus("access", settings)
    journal = Journal(
        settings.database_url, service="access", metadata=schema(), migrations=MIGRATIONS, project=project
    )
    keys = cache(partial(AccessKeys.in_file, settings.access_keys))
    accounts = Accounts(journal, keys, settings, settings.system_creds, utc_now, settings.compare_every)
    handlers = Handlers(journal, accounts, keys, utc_now, settings.credential_lifetime)
    accounts.read = lambda: handlers.read_revocations(bus.client)
    routes(bus, handlers)
    return Service(
        "access",
        settings,
        bus,
        opening=[
            partial(_read, keys),
            journal.open,
            accounts.open,
            lambda: first_admin.record(journal, settings.first_admin, accounts, utc_now),
        ],
        tasks=[
            lambda: run_relay(journal, bus.client),
            accounts.run,
        ],
        closing=[accounts.close, journal.close],
        checks=[journal.problem],
    )


async def _read(keys: Callable[[], AccessKeys]) -> None:
    keys()


def main() -> None:
    with errors_as_one_line():
        build(load(Settings)).run()


if __name__ == "__main__":
    main()
