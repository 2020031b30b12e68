"""Plots of `make bench-fleet`, each as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_SIZE = (6.4, 3.6)
Figures = Mapping[str, Any]


def write(out: Path, sizes: Sequence[Figures], offline: Figures | None) -> list[Path]:
    """Writes the plots that the figures allow. `sizes`: one rollout for each size of the fleet, ascending."""
    written: list[Path] = []
    if sizes:
        written += _save(out, "fleet-decided", lambda axes: _decided(axes, sizes[-1]))
    if grown := [one for one in sizes if one.get("cpu_ms_per_report")]:
        written += _save(out, "fleet-cpu", lambda axes: _cpu(axes, grown))
    if judged := [one for one in sizes if one.get("judgement_ms")]:
        written += _save(out, "fleet-judgements", lambda axes: _judgements(axes, judged))
    if offline:
        written += _save(out, "fleet-stages", lambda axes: _stages(axes, offline))
    return written


def _save(out: Path, name: str, draw: Any) -> list[Path]:
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    paths = [out / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def _decided(axes: Any, one: Figures) -> None:
    for label, curve in (("raw fan-out, received", one["raw_s"]), ("plan, decided", one["decided_s"])):
        axes.plot(curve, [100 * (k + 1) / len(curve) for k in range(len(curve))], label=label)
    axes.axvline(2 * one["raw_fanout_p99_s"], color="grey", linestyle=":", label="2 x raw fan-out of 99%")
    axes.set(title=f"{one['gateways']:,} gateways", xlabel="seconds after the plan was signed", ylabel="% of gateways")
    axes.legend()


def _cpu(axes: Any, sizes: Sequence[Figures]) -> None:
    axes.plot(_gateways(sizes), [one["cpu_ms_per_report"] for one in sizes], marker="o")
    axes.axhline(1.2 * sizes[0]["cpu_ms_per_report"], color="grey", linestyle=":", label="1.2 x the smallest fleet")
    axes.set(title="Processor time of the rollout service", ylabel="ms per report")
    _by_size(axes)


def _judgements(axes: Any, sizes: Sequence[Figures]) -> None:
    axes.plot(_gateways(sizes), [one["judgement_ms"] for one in sizes], marker="o")
    axes.axhline(50, color="grey", linestyle=":", label="50 ms")
    axes.set(title="Evaluating a gate once", ylabel="ms")
    _by_size(axes)


def _stages(axes: Any, offline: Figures) -> None:
    stages = offline["stages"]
    share = [100 * stage["gateways"] / offline["gateways"] for stage in stages]
    axes.bar([f"{stage['percent']:g}%" for stage in stages], share)
    for number, stage in enumerate(stages):
        axes.annotate(f"{stage['gateways']:,}", (number, share[number]), ha="center", va="bottom")
    axes.set(title=f"{offline['gateways']:,} gateways resolve a plan", xlabel="stage", ylabel="% of gateways")


def _gateways(sizes: Sequence[Figures]) -> list[int]:
    return [int(one["gateways"]) for one in sizes]


def _by_size(axes: Any) -> None:
    axes.set(xscale="log", xlabel="gateways", ylim=(0, None))
    axes.legend()
