"""Limits the rejected requests of each source, so that a secret cannot be guessed and dead letters cannot be flooded.

A source has `burst` rejections at once and one more per `every`; until then its requests are not looked at. Accepted
requests cost nothing. The source is the address that the NATS server saw, which the sender cannot choose
(`nats_auth`: the import of the command shares it). Devices behind one router share a source.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final

from prometheus_client import Counter

log = logging.getLogger("slmops.throttle")
_INFO_HEADER: Final = "Nats-Request-Info"
"""Written by the server when a request crosses accounts; it replaces a header of this name from the sender."""
INSIDE: Final = "services"
"""The source of requests from the services' own account."""
_MAX_SOURCES: Final = 10_000
THROTTLED = Counter("slmops_throttled_total", "Requests that were not looked at", ["service", "command"])


def source_of(headers: Mapping[str, Any] | None) -> str:
    """Returns the source of a request: an IPv4 address or an IPv6 network of 64 bits, which one host may own."""
    try:
        host = str(json.loads((headers or {})[_INFO_HEADER])["host"])
        address = ipaddress.ip_address(host)
    except (KeyError, TypeError, ValueError):
        return INSIDE
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


class Throttle:
    """A token bucket per source. `clock` returns seconds and never goes back."""

    def __init__(
        self,
        burst: int = 10,
        every: timedelta = timedelta(seconds=10),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = float(burst)
        self._every_s = every.total_seconds()
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By source: the rejections left, and the time of that count. Sources that are not in it have all."""

    def take(self, source: str) -> bool:
        """Takes one rejection from the source's budget before a request is handled; returns False if none is left.

        Taken first and not counted afterwards, so that requests that are handled at the same time cannot exceed it.
        """
        left = self._now(source)
        if left < 1:
            return False
        self._set(source, left - 1)
        return True

    def settle(self, source: str, *, rejected: bool) -> None:
        """Returns what `take` took unless the request was rejected. Logs the source whose budget is used up."""
        if not rejected:
            self._set(source, self._now(source) + 1)
        elif self._now(source) < 1:
            log.warning("too many requests of %s were rejected; not looking at the next ones", source)

    def _now(self, source: str) -> float:
        left, at = self._left.get(source, (self._burst, self._clock()))
        return min(self._burst, left + (self._clock() - at) / self._every_s)

    def _set(self, source: str, left: float) -> None:
        self._left.pop(source, None)
        if left < self._burst:
            self._left[source] = (left, self._clock())
        while len(self._left) > _MAX_SOURCES:
            self._left.popitem(last=False)
