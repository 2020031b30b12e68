"""Views of a system as a whole: its processes, disk, streams and expiry dates."""

from __future__ import annotations

from datetime import datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict

from slmops.contracts.commands import FleetSummary
from slmops.contracts.errors import Problem
from slmops.contracts.identity import Role, ServiceProcess


class ProcessView(BaseModel):
    """A process of `slmops up`, as its supervisor describes it in `state.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    status: str
    log: str
    pid: int | None = None
    restarts: int = 0
    last_exit: int | None = None
    last_error: str | None = None
    since: AwareDatetime


class DiskView(BaseModel):
    """The disk of the data folder."""

    model_config = ConfigDict(frozen=True)

    free_bytes: int
    size_bytes: int


class BacklogView(BaseModel):
    """A consumer of a stream and the messages that it has not finished."""

    model_config = ConfigDict(frozen=True)

    stream: str
    consumer: str
    pending: int


class ExpiryView(BaseModel):
    """Until when the keyholders' metadata of a role, or a server's certificate, is valid."""

    model_config = ConfigDict(frozen=True)

    role: str
    expires: datetime


class LocalStatus(BaseModel):
    """The part on this machine. `running`: a supervisor holds the lock of the data folder."""

    model_config = ConfigDict(frozen=True)

    data: str
    running: bool
    processes: tuple[ProcessView, ...]
    disk: DiskView
    expiry: tuple[ExpiryView, ...] = ()
    certificates: tuple[ExpiryView, ...] = ()
    """Of the servers and of the authority that signs them."""
    readable_keys: tuple[str, ...] = ()
    """Key files that other users of the machine can read."""


class CredentialsView(BaseModel):
    """Whose credentials the command line uses. `role` is None for a service's, `expires_at` for ones that never do."""

    model_config = ConfigDict(frozen=True)

    user: str
    role: Role | None = None
    expires_at: AwareDatetime | None = None


class Status(BaseModel):
    """`local` is None for a system on other machines, `problem` is the error of a bus that does not answer."""

    model_config = ConfigDict(frozen=True)

    version: str
    shared_revision: str = ""
    """Of the command line's own code."""
    nats_version: str | None = None
    services: tuple[ServiceProcess, ...] = ()
    """Every process of a service that answered."""
    local: LocalStatus | None = None
    backlog: tuple[BacklogView, ...] = ()
    dead_letters: int | None = None
    fleet: FleetSummary | None = None
    problem: Problem | None = None
    credentials: CredentialsView | None = None
