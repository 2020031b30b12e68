"""Joules: from the processor's own counter (RAPL, by Linux's powercap) where it may be read, else a labelled model.

https://docs.kernel.org/power/powercap/powercap.html. A package's counter knows no processes: it counts everything that
the machine does meanwhile, idling included, as a wall socket would.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CORE = 3.5
"""Of a busy virtual core: the average of Cloud Carbon Footprint's methodology for AWS, made from SPECpower results."""


class Energy(NamedTuple):
    joules: float
    source: Literal["measured", "modelled"]


class EnergyMeter:
    """Counts from when it is made. A counter that wraps once is understood; they do so after minutes at the least."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._packages = _packages(powercap)
        self._counters = _read(self._packages)
        self._processor_s = time.process_time()

    def read(self) -> Energy:
        """Since the meter was made. Modelled: the processor time of this process times `WATTS_PER_CORE`."""
        counters = _read(self._packages)
        if not counters or counters.keys() != self._counters.keys():
            return Energy((time.process_time() - self._processor_s) * WATTS_PER_CORE, "modelled")
        joules = sum((counters[zone] - before) % _range(zone) for zone, before in self._counters.items()) / 1e6
        return Energy(joules, "measured")


def _packages(powercap: Path) -> list[Path]:
    """Sockets only: their subzones are part of them, and `psys` contains them."""
    zones = sorted(powercap.glob("intel-rapl:*"))  # AMD's processors have the same name
    return [zone for zone in zones if _text(zone / "name").startswith("package")]


def _read(packages: list[Path]) -> Mapping[Path, int]:
    """Microjoules by zone; empty unless all may be read. Most systems let only root read them."""
    found = {zone: text for zone in packages if (text := _text(zone / "energy_uj"))}
    return {zone: int(text) for zone, text in found.items()} if len(found) == len(packages) else {}


def _range(zone: Path) -> int:
    return int(_text(zone / "max_energy_range_uj") or 2**32) + 1


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
