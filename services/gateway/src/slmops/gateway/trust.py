"""What this gateway trusts: the packager's repository says what may be installed.

Persisted below `trust/`, so that neither a restart nor a mirror of yesterday takes it back. What serves goes on serving
whatever this says: only something new, or a change, has to be trusted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.contracts.errors import NotReady, TemporaryError
from slmops.contracts.plan import Release
from slmops.contracts.trust import Attack, package_target, refused
from slmops.kit.client import BusClient

if TYPE_CHECKING:
    from slmops.kit.trust.client import Target, TrustedState

log = logging.getLogger(__name__)
ClientSource = Callable[[], BusClient | None]


class Trust:
    """`pinned` is the root of trust that this gateway was given out of band."""

    def __init__(self, gateway_id: str, client: ClientSource, home: Path, pinned: Path) -> None:
        self._gateway_id = gateway_id
        self._client = client
        self._home = home
        self._pinned = pinned

    async def check(self, release: Release, *, installed: bool = False) -> None:
        """Whether the repository vouches for the release, by what it says now.

        `installed`: it was vouched for when it was laid out here, and while nobody answers that is enough, so that a
        fleet can go back although the packager is down. Raises `TrustRefused`, which names the attack, and what
        fetching raises.
        """
        path = package_target(release.model, release.version, release.manifest.digest)
        try:
            found = await self._refreshed(path)
        except TemporaryError as error:
            if not installed:
                raise
            log.warning("%s:%s was trusted when it was installed: %s", release.model, release.version, error)
            return
        if found is None:
            raise refused(
                Attack.ARBITRARY_PACKAGE,
                f"the plan wants a package of {release.model}:{release.version} that nobody vouches for",
                where=release.manifest.digest,
                fix="See slmops trust show: the model may be revoked. Else somebody else writes the plan.",
            )
        if (found.digest, found.size) != (release.manifest.digest, release.manifest.size):
            what = f"plan and repository disagree about {release.model}:{release.version}"
            raise refused(Attack.ARBITRARY_PACKAGE, what, where=release.manifest.digest)

    async def _refreshed(self, path: str | None = None) -> Target | None:
        client = self._client()
        if client is None:
            raise NotReady("no network: what is trusted cannot be brought up to date yet")
        from slmops.kit.trust.bus import BusFetcher

        fetcher = BusFetcher(client, self._gateway_id, asyncio.get_running_loop())
        return await asyncio.to_thread(self._state.refresh, fetcher, path)

    @cached_property
    def _state(self) -> TrustedState:
        # It brings `tuf`, 0.4 s: loaded when something is to be trusted, not when a gateway starts.
        from slmops.kit.trust.client import TrustedState

        return TrustedState(self._home, self._pinned)
