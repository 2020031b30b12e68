"""Records the first admin, whom the owner of the system's keys made without this service."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from slmops.access import store
from slmops.access.domain import Person, record_first_admin
from slmops.contracts.errors import InvalidMessage
from slmops.kit.bus.access_keys import FirstAdmin
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork


async def record(journal: Journal, file: Path | None, clock: Clock) -> None:
    """Records the admin in `file`, if there is one. Raises `InvalidMessage`."""
    if file is None:
        return
    try:
        given = FirstAdmin.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise InvalidMessage(
            f"the first admin cannot be read: {type(error).__name__}", where=str(file), fix="Set SLMOPS_FIRST_ADMIN."
        ) from error
    admin = Person(given.user, given.role, given.public_key, given.expires_at)

    def work(unit: UnitOfWork) -> None:
        known, version = store.load(unit, admin.user)
        unit.append(store.stream(admin.user), version, record_first_admin(known, admin, clock()))

    await journal.transact(work)
