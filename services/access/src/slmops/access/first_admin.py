"""Records the first admin, whom the owner of the system's keys made without this service."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from slmops.access import store
from slmops.access.accounts import Accounts
from slmops.access.domain import Person, record_first_admin
from slmops.access.store import Holders
from slmops.contracts.errors import Denied, InvalidMessage
from slmops.kit.bus.access_keys import FirstAdmin
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork

log = logging.getLogger("slmops.access")


async def record(journal: Journal, file: Path | None, accounts: Accounts, clock: Clock) -> None:
    """Records the admin in `file`, if there is one. An admin whose key was revoked is only logged.

    Also asks the server, which knows revoked keys after a loss of the database. Raises `InvalidMessage`,
    `Unreachable`.
    """
    if file is None:
        return
    try:
        given = FirstAdmin.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise InvalidMessage(
            f"the first admin cannot be read: {type(error).__name__}", where=str(file), fix="Set SLMOPS_FIRST_ADMIN."
        ) from error
    admin = Person(given.user, given.role, given.public_key, given.expires_at)

    refused = admin.public_key in await accounts.revoked_people()

    def work(unit: UnitOfWork) -> None:
        known, version = store.load(unit, admin.user)
        revoked = refused or store.is_revoked(unit.connection, Holders.PEOPLE, admin.public_key)
        unit.append(store.stream(admin.user), version, record_first_admin(known, admin, revoked, clock()))

    try:
        await journal.transact(work)
    except Denied as error:
        log.error("%s", error)
