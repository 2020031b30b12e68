"""Decides what this gateway trusts. Two sources must agree before an install (as in Uptane): the packager's repository
lists the packages that may be installed, and the rollout service's signed plan names the one to install now. The
repository also names the keys that may sign plans.

The trusted state is stored below `trust/`, so that neither a restart nor an outdated mirror can roll it back. It never
stops a release that serves: only a new release or a change has to be trusted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import NotReady, SlmopsError, TemporaryError, TrustRefused
from slmops.contracts.plan import Identity, Plan, Release
from slmops.contracts.signed import PlanStatement
from slmops.contracts.tuf_names import Attack, RolloutKeys, package_target, refused
from slmops.gateway.disk_full import raise_disk_full
from slmops.kit.atomic_write import atomic_write
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import Clock
from slmops.kit.threads import Threads
from slmops.kit.trust.asking import Answers

if TYPE_CHECKING:
    from slmops.kit.trust.client import Target, TrustedState

log = logging.getLogger(__name__)
_OLD_PLAN_FILE = "plan.json"
"""Where an earlier release stored the newest accepted plan, without its blueprint."""
_DISK = Threads("trust", 1)
"""One thread, so that the newest generation is read, compared and stored in one step."""
ClientSource = Callable[[], Answers | None]
"""Returns the connected bus or, without a network, a bundle."""


class _Accepted(BaseModel):
    """The content of plan-BLUEPRINT.json: generation, signing key and digest of the newest accepted plan."""

    model_config = ConfigDict(frozen=True)

    keyid: str
    generation: int
    digest: str = ""

    @classmethod
    def of(cls, plan: Plan, keyid: str) -> _Accepted:
        digest = digest_of(plan.model_dump_json(by_alias=True).encode())
        return cls(keyid=keyid, generation=plan.generation, digest=digest)


class Authorization:
    """The trusted state and the checks against it.

    `pinned` is the root of trust that this gateway was given out of band. `grace` is how long after their expiry the
    timestamp, snapshot and plan of a bundle are still accepted. It does not apply to what comes over the bus.
    """

    def __init__(
        self,
        identity: Identity,
        client: ClientSource,
        home: Path,
        pinned: Path,
        clock: Clock,
        grace: timedelta = timedelta(),
    ) -> None:
        self._identity = identity
        self._client = client
        self._home = home
        self._pinned = pinned
        self._clock = clock
        self._grace = grace
        self._plan = b""
        self._opened: TrustedState | None = None
        self._opening = Lock()

    def move_to(self, identity: Identity) -> None:
        """Trusts plans of the identity's blueprint from now on. Each blueprint has generations of its own."""
        with suppress(FileNotFoundError):
            (self._home / _OLD_PLAN_FILE).rename(self._plan_file(self._identity.blueprint))
        self._identity, self._plan = identity, b""

    def _plan_file(self, blueprint: str) -> Path:
        return self._home / f"plan-{blueprint}.json"

    async def refresh(self, source: Answers) -> None:
        """Updates the trusted metadata from `source`. Raises `TrustRefused`, and what `source` raises."""
        await self._refreshed(source)

    async def plan(self, data: bytes, source: Answers | None = None) -> Plan:
        """Verifies a signed envelope and returns its plan. `source` is where it came from (default: the current one).

        The metadata is refreshed first, because the key may have been added or revoked since the last refresh. If that
        fails, the stored metadata is enough for a plan that was accepted before. If the repository does not answer, it
        is also enough for a new plan until the stored timestamp expires, so that a fleet can roll back meanwhile.

        Raises `TrustRefused`, `NotReady` if the gateway was moved meanwhile, and what fetching raises.
        """
        source, identity = source or self._client(), self._identity
        outdated = await self._try_refresh(source)
        keys = await asyncio.to_thread(lambda: self._state.rollout_keys())
        self._check_not_moved(identity)
        try:
            statement, keyid = self._open(data, keys, source)
        except TrustRefused as error:
            raise outdated or error from error
        await _DISK.complete(partial(self._accept, statement.plan, keyid, keys, outdated, source))
        self._check_not_moved(identity)
        self._plan = data
        return statement.plan

    def _check_not_moved(self, identity: Identity) -> None:
        """Raises `NotReady` if the gateway was moved since `identity` was read: a plan is for one blueprint."""
        if self._identity is not identity:
            raise NotReady(f"the gateway was moved to {self._identity.blueprint} during the check")

    def _accept(
        self, plan: Plan, keyid: str, keys: RolloutKeys | None, outdated: SlmopsError | None, source: Answers | None
    ) -> None:
        """Checks and stores the plan's generation. Runs in one thread, so that no other plan comes in between."""
        accepted, last = _Accepted.of(plan, keyid), self._accepted(plan.blueprint)
        if outdated is not None and accepted != last:
            self._check_in_time(outdated, source)
        _check_newest(plan, last, keys)
        if accepted != last:
            self._remember(plan.blueprint, accepted)

    async def _try_refresh(self, source: Answers | None) -> SlmopsError | None:
        """Updates the trusted metadata. Returns the error if it could not."""
        try:
            await self._refreshed(source)
        except SlmopsError as error:
            return error
        return None

    def _check_in_time(self, outdated: SlmopsError, source: Answers | None) -> None:
        """Raises `outdated` unless the repository just did not answer and the stored timestamp is still valid."""
        until = self._state.valid_until()
        late = until is None or until + self._grace_of(source) <= self._clock()
        if late or not isinstance(outdated, TemporaryError):
            raise outdated
        log.warning("following a plan by metadata that could not be refreshed: %s", outdated)

    async def check(self, release: Release, *, installed: bool = False) -> None:
        """Checks that the repository, as of now, and the plan both name the release.

        `installed`: the release was checked when it was installed. While the repository does not answer, that is
        enough, so that a fleet can roll back although the packager is down. Raises `TrustRefused`, which names the
        attack, `NotReady` if the gateway was moved meanwhile, and what fetching raises.
        """
        source, identity = self._client(), self._identity
        path = package_target(release.model, release.version, release.manifest.digest)
        try:
            found = await self._refreshed(source, path)
        except TemporaryError as error:
            if not installed:
                raise
            log.warning("%s:%s was trusted when it was installed: %s", release.model, release.version, error)
            return
        if self._plan or not installed:
            # Verify again: the key that signed the plan may have been revoked since the plan was read.
            keys = await asyncio.to_thread(lambda: self._state.rollout_keys())
            self._check_not_moved(identity)
            self._open(self._plan, keys, source)
        if found is None:
            raise refused(
                Attack.ARBITRARY_PACKAGE,
                f"the plan wants a package of {release.model}:{release.version} that the repository does not list",
                where=release.manifest.digest,
                fix="Run slmops trust show: if the model is not revoked, somebody else may have written the plan.",
            )
        if (found.digest, found.size) != (release.manifest.digest, release.manifest.size):
            what = f"plan and repository disagree about {release.model}:{release.version}"
            raise refused(Attack.ARBITRARY_PACKAGE, what, where=release.manifest.digest)

    def _open(self, data: bytes, keys: RolloutKeys | None, source: Answers | None) -> tuple[PlanStatement, str]:
        from slmops.kit.trust.plans import open_plan

        if keys is None:
            raise refused(Attack.WRONG_KEY, "the keys that may sign plans are not known yet", where="plan")
        statement, keyid = open_plan(data, keys)
        if statement.plan.blueprint != self._identity.blueprint:
            what = f"this is the plan of {statement.plan.blueprint}, not of {self._identity.blueprint}"
            raise refused(Attack.MIX_AND_MATCH, what, where="plan")
        if statement.expires_at + self._grace_of(source) <= self._clock():
            what = f"the newest available plan expired on {statement.expires_at:%Y-%m-%d}"
            raise refused(Attack.FREEZE, what, where="plan", fix="Start the rollout service; it signs the plan again.")
        return statement, keyid

    def _accepted(self, blueprint: str) -> _Accepted | None:
        for file in (self._plan_file(blueprint), self._home / _OLD_PLAN_FILE):
            with suppress(FileNotFoundError):
                return _Accepted.model_validate_json(file.read_bytes())
        return None

    def _remember(self, blueprint: str, accepted: _Accepted) -> None:
        with raise_disk_full("to store the plan's generation", self._home):
            self._home.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._plan_file(blueprint)) as out:
                out.write(accepted.model_dump_json().encode())
            (self._home / _OLD_PLAN_FILE).unlink(missing_ok=True)

    async def _refreshed(self, source: Answers | None, path: str | None = None) -> Target | None:
        if source is None:
            raise NotReady("cannot update the trusted metadata: no network yet")
        from slmops.kit.trust.bus import BusFetcher

        fetcher = BusFetcher(source, self._identity.gateway_id, asyncio.get_running_loop())
        grace = self._grace_of(source)
        return await asyncio.to_thread(lambda: self._state.refresh(fetcher, path, grace))

    def _grace_of(self, source: Answers | None) -> timedelta:
        return timedelta() if source is None or isinstance(source, BusClient) else self._grace

    @property
    def _state(self) -> TrustedState:
        """Waits for the disk the first time."""
        # Importing `tuf` takes 0.4 s, so it is imported at the first check, not when a gateway starts.
        from slmops.kit.trust.client import TrustedState

        with self._opening:
            self._opened = self._opened or TrustedState(self._home, self._pinned)
            return self._opened


def _check_newest(plan: Plan, last: _Accepted | None, keys: RolloutKeys | None) -> None:
    """Raises `TrustRefused` if the generation went back. A generation set by a revoked key does not count."""
    trusted = {key.keyid for key in keys.keys} if keys else set()
    if last is not None and last.keyid in trusted and plan.generation < last.generation:
        raise refused(
            Attack.ROLLBACK,
            f"the plan has generation {plan.generation}, but this gateway already accepted {last.generation}",
            where="plan",
            fix="If the rollout service lost its database, rotate its key and revoke the old one.",
        )
