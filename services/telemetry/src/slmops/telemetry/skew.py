"""Names each gateway whose clock is wrong in the log once, and again after it was right meanwhile."""

from __future__ import annotations

import logging
from collections import OrderedDict
from datetime import timedelta
from typing import Final

from slmops.contracts.clocks import clock_text, is_wrong

log = logging.getLogger("slmops.telemetry")
MOST: Final = 10_000
"""How many gateways are remembered. A fleet with more wrong clocks has its oldest ones named again."""


class WrongClocks:
    def __init__(self) -> None:
        self._known: OrderedDict[str, None] = OrderedDict()

    def note(self, gateway_id: str, ahead: timedelta | None) -> None:
        """Notes how far a gateway's clock is ahead of the services'; None if it does not say. O(1)."""
        if ahead is None or (gateway_id in self._known and is_wrong(ahead)):
            return
        if not is_wrong(ahead):
            self._known.pop(gateway_id, None)
            return
        self._known[gateway_id] = None
        if len(self._known) > MOST:
            self._known.popitem(last=False)
        log.warning(
            "the clock of %s is %s; its measurements count by the time of their arrival", gateway_id, clock_text(ahead)
        )
