"""Measures energy with the processor's counter (RAPL, by Linux's powercap); if it cannot be read, estimates it.

https://docs.kernel.org/power/powercap/powercap.html. The counter of a package does not distinguish processes: it counts
everything that the processor does meanwhile, including idling.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CORE = 3.5
"""Power of a busy virtual core: the average in Cloud Carbon Footprint's methodology for AWS, from SPECpower results."""


class Energy(NamedTuple):
    joules: float
    source: Literal["measured", "modelled"]


class EnergyMeter:
    """Measures energy from its creation. It handles one wrap of a counter, which takes minutes at least."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._packages = _packages(powercap)
        self._counters = _read(self._packages)
        self._processor_s = time.process_time()

    def read(self) -> Energy:
        """Returns the energy since the meter was created.

        If it is modelled, it is the processor time of this process times `WATTS_PER_CORE`.
        """
        counters = _read(self._packages)
        if not counters or counters.keys() != self._counters.keys():
            return Energy((time.process_time() - self._processor_s) * WATTS_PER_CORE, "modelled")
        joules = sum((counters[zone] - before) % _range(zone) for zone, before in self._counters.items()) / 1e6
        return Energy(joules, "measured")


def _packages(powercap: Path) -> list[Path]:
    """Returns the sockets only: subzones are included in them, and `psys` contains them."""
    zones = sorted(powercap.glob("intel-rapl:*"))  # AMD's processors have the same name
    return [zone for zone in zones if _text(zone / "name").startswith("package")]


def _read(packages: list[Path]) -> Mapping[Path, int]:
    """Returns microjoules by zone; empty unless all can be read. On most systems only root can read them."""
    found = {zone: text for zone in packages if (text := _text(zone / "energy_uj"))}
    return {zone: int(text) for zone, text in found.items()} if len(found) == len(packages) else {}


def _range(zone: Path) -> int:
    return int(_text(zone / "max_energy_range_uj") or 2**32) + 1


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
