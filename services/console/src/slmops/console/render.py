"""Views as tables for people. Pure: the present and the width come in.

Texts that came over the wire are shown as they are, never as markup, and without control characters: a gateway must not
be able to write to an operator's terminal what it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Generic, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slmops.contracts.blueprint import Stage
from slmops.contracts.commands import (
    BlueprintView,
    GatewayView,
    PackageView,
    RolloutView,
    StageView,
    VariantView,
    VersionView,
)
from slmops.contracts.errors import Problem
from slmops.contracts.evaluation import Evaluation
from slmops.kit.deadletters import DeadLetter

WIDE = 110
"""From this width on a table has room for its less important columns."""

_STYLES = {
    "packaged": "green", "passed": "green", "completed": "green", "committed": "green", "chosen": "bold green",
    "refused": "red", "failed": "red", "rolled_back": "red", "aborted": "red", "retired": "dim",
    "optimizing": "yellow", "downloading": "yellow", "soaking": "yellow", "held": "yellow", "paused": "yellow",
}  # fmt: skip
Cell = Text | str
V = TypeVar("V")


@dataclass(frozen=True)
class _Column(Generic[V]):
    """`fold`: long text that wraps in what room is left. `wide`: only where there is room."""

    heading: str
    cell: Callable[[V], Cell]
    right: bool = False
    fold: bool = False
    wide: bool = False


def printable(text: str) -> str:
    """The text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _text(value: object, style: str = "") -> Text:
    return Text("" if value is None else printable(str(value)), style=style)


def _state(value: str) -> Text:
    return _text(value, _STYLES.get(value, ""))


def size(size_bytes: float | None) -> str:
    """Decimal units: 512 B, 98.4 MB, 538 MB."""
    if size_bytes is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.{0 if unit == 'B' or size_bytes >= 99.95 else 1}f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"


def duration(length: timedelta) -> str:
    """In one unit: 42 s, 3 min, 5 h, 2 d."""
    seconds = max(0, int(length.total_seconds()))
    for limit_s, unit_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit_s:
            return f"{seconds // unit_s} {unit}"
    return f"{seconds // 86400} d"


def short(digest: str | None) -> str:
    """The first twelve hexadecimal digits."""
    return (digest or "").removeprefix("sha256:")[:12]


def _moment(at: datetime, now: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC, {duration(now - at)} ago"


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def _table(views: Sequence[V], columns: Sequence[_Column[V]], width: int = 0) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    shown = [column for column in columns if not column.wide or width >= WIDE]
    for column in shown:
        table.add_column(
            column.heading,
            justify="right" if column.right else "left",
            no_wrap=not column.fold,
            overflow="fold" if column.fold else "ellipsis",
            min_width=12 if column.fold else None,
        )
    for view in views:
        table.add_row(*(column.cell(view) for column in shown))
    return table


def _pairs(rows: Iterable[tuple[str, Cell | None]]) -> Table:
    """Names and values; empty values are left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value:
            table.add_row(_text(name), value if isinstance(value, Text) else _text(value))
    return table


def _or(table: Table, nothing: str) -> RenderableType:
    return table if table.row_count else Text(nothing, style="dim")


def problem_text(problem: Problem) -> Text:
    """What, where, fix: one line each."""
    lines = [Text.assemble(("error", "bold red"), f" [{problem.code}]: ", _text(problem.what))]
    if problem.where:
        lines.append(Text.assemble(("  where: ", "dim"), _text(problem.where)))
    if problem.fix:
        lines.append(Text.assemble(("  fix:   ", "dim"), _text(problem.fix)))
    return Text("\n").join(lines)


def answer(text: str) -> Text:
    return _text(text)


# ---- models -----------------------------------------------------------------------------------------------


def versions(views: Sequence[VersionView], now: datetime, width: int) -> RenderableType:
    columns: list[_Column[VersionView]] = [
        _Column("model", lambda v: v.model),
        _Column("version", lambda v: v.version),
        _Column("stage", lambda v: _state("retired" if v.state == "retired" else v.stage)),
        _Column("size", lambda v: size(v.size_bytes), right=True),
        _Column("format", lambda v: _text(v.format), wide=True),
        _Column("architecture", lambda v: _text(v.architecture), wide=True),
        _Column("digest", lambda v: short(v.digest), wide=True),
        _Column("aliases", lambda v: ", ".join(v.aliases)),
        _Column("age", lambda v: duration(now - v.at), right=True),
        _Column("progress", lambda v: _text(v.progress), fold=True),
    ]
    nothing = "No models yet. Push one: slmops model push PATH --name NAME --version 1.0.0"
    return _or(_table(views, columns, width), nothing)


def version(view: VersionView, now: datetime, width: int) -> RenderableType:
    facts = _pairs(
        [
            ("model", f"{view.model}:{view.version}"),
            ("stage", _state(view.stage)),
            ("state", view.state),
            ("aliases", ", ".join(view.aliases)),
            ("format", f"{view.format}, {view.architecture}"),
            ("size", size(view.size_bytes)),
            ("digest", view.digest),
            ("registered", _moment(view.at, now)),
            ("progress", view.progress),
        ]
    )
    parts: list[RenderableType] = [facts]
    if view.variants:
        parts += ["", variants(view.variants, width)]
    if view.packages:
        parts += ["", _packages(view.packages, now)]
    return Group(*parts)


def variants(views: Sequence[VariantView], width: int) -> RenderableType:
    columns: list[_Column[VariantView]] = [
        _Column("version", lambda v: f"{v.model}:{v.version}"),
        _Column("profile", lambda v: v.profile, wide=True),
        _Column("recipe", lambda v: v.recipe),
        _Column("gate", lambda v: _state("chosen" if v.chosen else v.gate)),
        _measured("size", lambda e: size(e.bytes)),
        _measured("KL", lambda e: _figure(e.kl, ".3f")),
        _measured("top-1", lambda e: _figure(e.top1, ".1%")),
        _measured("ppl", lambda e: _figure(e.ppl, ".1f"), wide=True),
        _measured("tok/s", lambda e: _figure(e.tokens_per_s, ".0f")),
        _measured("TTFT", lambda e: _figure(e.ttft_s, ".2f", " s"), wide=True),
        _measured("RSS", lambda e: size(e.peak_rss_bytes), wide=True),
    ]
    if not views:
        return Text("No variants yet.", style="dim")
    # Below and not in a column: why one was chosen is what people want to read, and figures leave it no room.
    reasons = _pairs((f"{v.model}:{v.version} {v.recipe}", v.reason) for v in views)
    return Group(_table(views, columns, width), "", reasons)


def _measured(heading: str, cell: Callable[[Evaluation], str], wide: bool = False) -> _Column[VariantView]:
    return _Column(heading, lambda v: cell(v.evaluation) if v.evaluation else "", right=True, wide=wide)


def _packages(views: Sequence[PackageView], now: datetime) -> Table:
    columns: list[_Column[PackageView]] = [
        _Column("package", lambda p: short(p.manifest.digest)),
        _Column("profile", lambda p: p.profile),
        _Column("recipe", lambda p: p.recipe),
        _Column("size", lambda p: size(p.size_bytes), right=True),
        _Column("age", lambda p: duration(now - p.at), right=True),
    ]
    return _table(views, columns)


# ---- blueprints and rollouts ------------------------------------------------------------------------------


def blueprints(views: Sequence[BlueprintView], now: datetime) -> RenderableType:
    columns: list[_Column[BlueprintView]] = [
        _Column("blueprint", lambda b: b.spec.name),
        _Column("revision", lambda b: str(b.revision), right=True),
        _Column("model", lambda b: b.spec.model),
        _Column("profile", lambda b: b.spec.profile),
        _Column("stable", lambda b: b.stable.version if b.stable else "none"),
        _Column("age", lambda b: duration(now - b.at), right=True),
        _Column("stages", lambda b: _text(" → ".join(map(_scope, b.spec.stages))), fold=True),
    ]
    return _or(_table(views, columns), "No blueprints yet. Apply one: slmops blueprint apply FILE")


def _scope(stage: Stage) -> str:
    labels = ",".join(f"{key}={value}" for key, value in sorted(stage.selector.items()))
    share = f"{stage.percent:g}%" if stage.percent < 100 or not labels else ""
    return " ".join(part for part in (stage.name, share, labels) if part)


def rollouts(views: Sequence[RolloutView], now: datetime, width: int) -> RenderableType:
    columns: list[_Column[RolloutView]] = [
        _Column("blueprint", lambda r: r.blueprint),
        _Column("release", lambda r: f"{r.model}:{r.version}"),
        _Column("state", lambda r: _state(r.state)),
        _Column("stage", lambda r: _text(_stage(r))),
        _Column("took", lambda r: duration((r.ended_at or now) - r.started_at), right=True),
        _Column("age", lambda r: duration(now - r.started_at), right=True, wide=True),
        _Column("rollout", lambda r: _text(r.rollout), wide=True),
        _Column("reason", lambda r: _text(r.reason), fold=True),
    ]
    return _or(_table(views, columns, width), "No rollouts yet. Start one: slmops rollout start BLUEPRINT")


def _stage(view: RolloutView) -> str:
    return f"{view.stage + 1}/{len(view.stages)} {view.stages[view.stage].name}"


def rollout(view: RolloutView, gateways: Sequence[GatewayView], now: datetime) -> RenderableType:
    """One rollout as it stands: its stages, and the gateways that it moves."""
    head = _pairs(
        [
            ("rollout", view.rollout),
            ("moves", f"{view.blueprint} to {view.model}:{view.version}"),
            ("state", _state(view.state)),
            ("took", duration((view.ended_at or now) - view.started_at)),
            ("reason", view.reason),
        ]
    )
    columns: list[_Column[tuple[int, StageView]]] = [
        _Column("stage", lambda s: _text(s[1].name, "bold" if s[0] == view.stage and not view.ended_at else "")),
        _Column("targets", lambda s: str(s[1].targets), right=True),
        _Column("committed", lambda s: str(s[1].committed), right=True),
        _Column("failed", lambda s: _text(s[1].failed, "red" if s[1].failed else ""), right=True),
        _Column("waiting for", lambda s: _text(s[1].waiting), fold=True),
    ]
    parts: list[RenderableType] = [head, "", _table(list(enumerate(view.stages)), columns)]
    if gateways:
        parts += ["", _table(gateways, _gateway_columns(now))]
    return Group(*parts)


def rollout_line(view: RolloutView) -> str:
    """The same in a line, for a log."""
    stage = view.stages[view.stage]
    reached = f"{stage.committed} of {stage.targets} committed, {stage.failed} failed"
    more = [text for text in (view.reason, stage.waiting and f"waiting for {stage.waiting}") if text]
    return printable(f"{view.state}, stage {_stage(view)}: {'; '.join([reached, *more])}")


# ---- gateways ---------------------------------------------------------------------------------------------


def gateways(views: Sequence[GatewayView], now: datetime, width: int) -> RenderableType:
    return _or(_table(views, _gateway_columns(now), width), "No gateways yet. One appears here when it has enrolled.")


def _gateway_columns(now: datetime) -> list[_Column[GatewayView]]:
    return [
        _Column("gateway", lambda g: g.gateway_id),
        _Column("blueprint", lambda g: g.blueprint, wide=True),
        _Column("labels", lambda g: _text(_labels(g)), wide=True),
        _Column("phase", lambda g: _state(g.phase.value)),
        _Column("running", lambda g: f"{g.running_version or 'nothing'}{'' if g.running == g.desired else ' *'}"),
        _Column("tok/s", lambda g: _figure(g.measured.get("tokens_per_s"), ".0f"), right=True),
        _Column("seen", lambda g: duration(now - g.last_seen), right=True),
        _Column("problem", lambda g: _text(g.problem.what if g.problem else ""), fold=True),
    ]


def _labels(g: GatewayView) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(g.labels.items()))


def gateway(g: GatewayView, api: str | None, now: datetime) -> RenderableType:
    facts: list[tuple[str, Cell | None]] = [
        ("gateway", g.gateway_id),
        ("blueprint", g.blueprint),
        ("labels", _labels(g)),
        ("phase", _state(g.phase.value)),
        ("running", f"{g.running_version or 'nothing'}  {short(g.running)}"),
        ("target", short(g.target)),
        ("desired", short(g.desired)),
        *((f"  {field}", because) for field, because in sorted(g.desired_because.items())),
        ("plan", f"generation {g.plan_generation}"),
        *((name, f"{value:.4g}") for name, value in sorted(g.measured.items())),
        ("API", api),
        ("last seen", _moment(g.last_seen, now)),
    ]
    parts: list[RenderableType] = [_pairs(facts)]
    if g.problem is not None:
        parts += ["", problem_text(g.problem)]
    return Group(*parts)


# ---- dead letters -----------------------------------------------------------------------------------------


def dead_letters(letters: Sequence[DeadLetter], now: datetime, width: int) -> RenderableType:
    columns: list[_Column[DeadLetter]] = [
        _Column("seq", lambda d: str(d.sequence), right=True),
        # The consumer's name is its service and this subject's template.
        _Column("subject", lambda d: _text(d.subject), fold=True),
        _Column("consumer", lambda d: _text(d.consumer.partition("/")[0])),
        _Column("code", lambda d: _text(d.code)),
        _Column("size", lambda d: size(d.size_bytes), right=True),
        _Column("age", lambda d: duration(now - d.at), right=True),
        _Column("reason", lambda d: _text(d.reason), fold=True),
    ]
    return _or(_table(letters, columns, width), "No dead letters.")


def payload(sequence: int, text: str) -> RenderableType:
    return Group("", Text(f"payload of {sequence}", style="bold"), _text(text))


def replayed(rows: Sequence[tuple[int, str, Problem | None]]) -> RenderableType:
    columns: list[_Column[tuple[int, str, Problem | None]]] = [
        _Column("seq", lambda r: str(r[0]), right=True),
        _Column("subject", lambda r: _text(r[1])),
        _Column("outcome", lambda r: problem_text(r[2]) if r[2] else _text("replayed", "green"), fold=True),
    ]
    return _or(_table(rows, columns), "No dead letters.")
