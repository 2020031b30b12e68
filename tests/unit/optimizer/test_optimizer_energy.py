"""Energy from the kernel's counters, or modelled from processor time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from slmops.optimizer.measure.energy import WATTS_PER_CORE, EnergyMeter


def zone(powercap: Path, folder: str, name: str, microjoules: int, largest: int = 10**12) -> Path:
    path = powercap / folder
    path.mkdir()
    for file, text in {"name": name, "energy_uj": microjoules, "max_energy_range_uj": largest}.items():
        (path / file).write_text(f"{text}\n")
    return path


def test_packages_are_added_up_without_their_subzones(tmp_path: Path) -> None:
    zones = [
        zone(tmp_path, "intel-rapl:0", "package-0", 1_000),
        zone(tmp_path, "intel-rapl:1", "package-1", 2_000),
        zone(tmp_path, "intel-rapl:0:0", "core", 500),
        zone(tmp_path, "intel-rapl:2", "psys", 4_000),
    ]
    meter = EnergyMeter(tmp_path)
    for path in zones:
        counter = path / "energy_uj"
        counter.write_text(str(int(counter.read_text()) + 3_000_000))
    assert meter.read() == (6, "measured")


def test_a_wrapped_counter_is_handled(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, largest=9_999_999) / "energy_uj"
    meter = EnergyMeter(tmp_path)
    counter.write_text("500000")
    assert meter.read() == (1.5, "measured")


def spend(seconds: float) -> float:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    return time.process_time() - start


def test_without_a_counter_the_energy_is_modelled_and_labelled_so(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path / "absent")
    spent = spend(0.2)
    joules, source = meter.read()
    assert source == "modelled"
    assert joules == pytest.approx(spent * WATTS_PER_CORE, rel=0.2)


def test_the_energy_is_modelled_if_one_counter_cannot_be_read(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000)
    closed = zone(tmp_path, "intel-rapl:1", "package-1", 1_000) / "energy_uj"
    closed.unlink()
    closed.mkdir()  # a folder, because root could read a file without permissions
    assert EnergyMeter(tmp_path).read().source == "modelled"
