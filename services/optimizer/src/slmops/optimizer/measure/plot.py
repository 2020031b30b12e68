"""Plots the variants of a search: quality against bytes and tokens/s, with the front and the device's limits."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slmops.contracts.evaluation import Evaluation
from slmops.contracts.profile import DeviceProfile
from slmops.optimizer.domain.front import on_front
from slmops.optimizer.domain.gate import max_bytes
from slmops.optimizer.domain.result import JobResult, Variant
from slmops.optimizer.measure.labels import Named, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STOCK = "build"  # the pass that runs the builder's own quantization
_LEAST_KL = 1e-6  # drawn for a KL of 0, which a logarithmic axis cannot show
_OURS, _STOCK_COLOUR, _CHOSEN, _FORBIDDEN = "#1f5fa8", "#c2571a", "#1d7a3a", "#b3261e"


class _Panel(NamedTuple):
    label: str
    unit: str
    of: Callable[[Evaluation], float]
    limit: Callable[[DeviceProfile], float]
    less_is_better: bool


class _Mark(NamedTuple):
    """One variant in one panel. `low` and `high` are the interval of `kl`; both equal `kl` if none was measured."""

    variant: Variant
    x: float
    kl: float
    low: float
    high: float

    @property
    def stock(self) -> bool:
        return any(step.pass_ == _STOCK for step in self.variant.definition.passes)


_PANELS = (
    _Panel("package", "MB", lambda e: e.bytes / 1e6, lambda p: max_bytes(p) / 1e6, less_is_better=True),
    _Panel(
        "speed", "tokens/s", lambda e: e.tokens_per_s or math.nan, lambda p: p.min_tokens_per_s, less_is_better=False
    ),
)


def draw(result: JobResult, profile: DeviceProfile, paths: Sequence[Path]) -> None:
    """Writes the same plot to each of `paths`, in the format of its suffix; lists variants without figures below it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.hashsalt": "slmops", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(15, 7.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2, sharey=True)
        marks = [_marks(result, panel) for panel in _PANELS]
        for ax, panel, found in zip(axes, _PANELS, marks, strict=True):
            _draw_panel(ax, panel, found, profile, result.choice.recipe)
        axes[0].set_ylabel("KL(reference ‖ variant), nats per token, 95% interval")
        axes[0].legend(loc="best", frameon=False, fontsize=8)
        figure.supxlabel(_caption(result, profile, {mark.variant.recipe for mark in marks[0]}), fontsize=8.5)
        figure.draw_without_rendering()  # labels need the final positions
        figure.set_layout_engine("none")
        for ax, found in zip(axes, marks, strict=True):
            place(ax, [Named(m.variant.recipe, m.x, m.kl, m.low, m.high) for m in found], bold=result.choice.recipe)
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})


def _marks(result: JobResult, panel: _Panel) -> list[_Mark]:
    found = []
    for variant in result.variants:
        e = variant.evaluation
        if e is None or e.kl is None or not math.isfinite(e.kl) or not math.isfinite(panel.of(e)):
            continue
        ends = [end if end is not None and math.isfinite(end) else e.kl for end in (e.kl_low, e.kl_high)]
        found.append(_Mark(variant, panel.of(e), *(max(kl, _LEAST_KL) for kl in (e.kl, *ends))))
    return found


def _draw_panel(ax: Axes, panel: _Panel, marks: Sequence[_Mark], profile: DeviceProfile, chosen: str | None) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    ax.set_yscale("log")
    ax.set_xscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    ax.set_xlabel(f"{panel.label}, {panel.unit} ({'less' if panel.less_is_better else 'more'} is better)")
    ax.margins(0.12)
    ax.grid(which="major", color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)
    for mark in marks:
        _draw_mark(ax, mark, is_chosen=mark.variant.recipe == chosen)
    sign = 1 if panel.less_is_better else -1
    best = [marks[number] for number in on_front([(sign * mark.x, mark.kl) for mark in marks])]
    line = ([mark.x for mark in best], [mark.kl for mark in best])
    ax.plot(*line, drawstyle="steps-post", color=_OURS, linewidth=1, alpha=0.6, zorder=1, label="front of this panel")
    _shade(ax, panel, profile)


def _draw_mark(ax: Axes, mark: _Mark, *, is_chosen: bool) -> None:
    """Draws a variant: filled if it passes the device's gate, hollow if it is refused."""
    colour = _CHOSEN if is_chosen else _STOCK_COLOUR if mark.stock else _OURS
    passed = mark.variant.verdict.passed
    kind = (
        "chosen" if is_chosen else f"{'stock builder' if mark.stock else 'ours'}, {'passes' if passed else 'refused'}"
    )
    ax.errorbar(mark.x, mark.kl, [[mark.kl - mark.low], [mark.high - mark.kl]], color=colour, linewidth=0.8, zorder=2)
    known = ax.get_legend_handles_labels()[1]
    ax.plot(
        *(mark.x, mark.kl),
        marker="*" if is_chosen else "s" if mark.stock else "o",
        markersize=14 if is_chosen else 6.5,
        linestyle="none",
        color=colour,
        markerfacecolor=colour if passed else "white",
        zorder=3,
        label=None if kind in known else kind,
    )


def _shade(ax: Axes, panel: _Panel, profile: DeviceProfile) -> None:
    """Shades the areas beyond the device's limits, if they are inside the panel."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    x, kl = panel.limit(profile), profile.max_kl
    line: dict[str, Any] = {"color": _FORBIDDEN, "zorder": 0, "linewidth": 0.8, "linestyle": "--"}
    area: dict[str, Any] = {"color": _FORBIDDEN, "zorder": 0, "linewidth": 0, "alpha": 0.05}
    text: dict[str, Any] = {"color": _FORBIDDEN, "fontsize": 7, "textcoords": "offset points", "ha": "right"}
    if bottom < kl < top:
        ax.axhline(kl, **line)
        ax.axhspan(kl, top, **area)
        if panel is _PANELS[0]:  # both panels share this axis
            ax.annotate(f"{profile.name}: KL {kl:g}", (right, kl), (-2, 2), **text)
    if left < x < right:
        ax.axvline(x, **line)
        ax.axvspan(*((x, right) if panel.less_is_better else (left, x)), **area)
        ax.annotate(f"{profile.name}: {x:g} {panel.unit}", (x, top), (-2, -2), rotation=90, va="top", **text)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)


def _caption(result: JobResult, profile: DeviceProfile, drawn: set[str]) -> str:
    r, p = result.reference, profile
    lines = [
        f"Reference: {r.architecture}, {r.parameters / 1e6:.4g} million parameters in float32, perplexity {r.ppl:.4g} "
        f"on {r.windows} windows of {r.window_tokens} tokens. {p.name} allows {max_bytes(p) / 1e6:g} MB, "
        f"KL {p.max_kl:g} at the interval's upper end, and at least {p.min_tokens_per_s:g} tokens/s.",
        f"Choice: {result.choice.reason}.",
    ]
    if missing := [variant.recipe for variant in result.variants if variant.recipe not in drawn]:
        lines.append(f"Without figures: {', '.join(missing)}.")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 190))
