"""Metadata that people must sign is reported 60 days before it expires, and the packager says so in log and metric."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from slmops.kit.journal import Journal
from slmops.kit.trust.ceremony import ceremony
from slmops.kit.trust.expiry import ExpiryWatch, Validity, validity, warning
from slmops.kit.trust.folder import Folder
from slmops.packager.store import MIGRATIONS, project, schema
from slmops.packager.tuf_metadata import TufMetadata

SIGNED = datetime(2026, 1, 1, tzinfo=UTC)
EXPIRES = SIGNED + timedelta(days=365)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (timedelta(days=61), Validity.VALID),
        (timedelta(days=60), Validity.EXPIRES_SOON),
        (timedelta(seconds=1), Validity.EXPIRES_SOON),
        (timedelta(), Validity.EXPIRED),
        (timedelta(days=-1), Validity.EXPIRED),
    ],
)
def test_metadata_expires_soon_from_sixty_days_before(before: timedelta, expected: Validity) -> None:
    now = EXPIRES - before
    assert validity(EXPIRES, now) is expected
    assert (warning("root", EXPIRES, now) is None) is (expected is Validity.VALID)


def test_a_warning_names_role_date_and_remedy() -> None:
    text = warning("revoked", EXPIRES, EXPIRES - timedelta(days=10)) or ""
    assert text.startswith("revoked expires on 2027-01-01, in 10 days.")
    assert "slmops trust rotate targets --keep-keys" in text
    assert "root expired on 2027-01-01" in (warning("root", EXPIRES, EXPIRES) or "")


def test_a_warning_is_repeated_daily_and_stops_after_the_renewal(caplog: pytest.LogCaptureFixture) -> None:
    watch, now = ExpiryWatch(), EXPIRES - timedelta(days=30)
    for hours in (0, 1, 23, 24, 25):
        watch.note({"root": EXPIRES, "timestamp": now + timedelta(days=1)}, now + timedelta(hours=hours))
    assert len(caplog.records) == 2
    watch.note({"root": EXPIRES + timedelta(days=300)}, now + timedelta(days=9))
    assert len(caplog.records) == 2


class Clock:
    def __init__(self) -> None:
        self.now = SIGNED

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(
        f"sqlite:///{tmp_path}/packager.db",
        service="packager",
        metadata=schema(),
        migrations=MIGRATIONS,
        project=project,
    )
    await journal.open()
    yield journal
    await journal.close()


async def test_the_packager_reports_the_dates_that_the_fleet_sees(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, clock = Folder(tmp_path / "tuf"), Clock()
    ceremony(folder, SIGNED).apply()
    trust = TufMetadata(journal, folder.online, folder.metadata, clock, timedelta(seconds=30))
    await trust.open()
    assert [record for record in caplog.records if "expire" in record.getMessage()] == []
    clock.now = EXPIRES - timedelta(days=59)
    await trust.open()
    warned = [record.getMessage() for record in caplog.records if "expires on" in record.getMessage()]
    assert [text.split()[2] for text in warned] == ["root", "targets"]

    def gauge(role: str) -> float | None:
        return REGISTRY.get_sample_value("slmops_trust_expires_timestamp_seconds", {"role": role})

    assert gauge("root") == gauge("targets") == EXPIRES.timestamp()
    assert gauge("timestamp") == (clock.now + timedelta(days=1)).timestamp()
