"""Renders models, rollouts, gateways, storage and dead letters as tables. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

from rich.console import Group, RenderableType
from rich.text import Text

from slmops.console.render.fleet_summary import REASONS
from slmops.console.render.optimizer import interval
from slmops.console.render.tables import (
    WIDE,
    Cell,
    Column,
    cell,
    duration,
    figure,
    moment,
    or_else,
    pairs,
    printable,
    problem_text,
    short,
    size,
    state,
    table,
)
from slmops.contracts.blueprint import Stage
from slmops.contracts.clocks import clock_text, is_wrong
from slmops.contracts.commands import (
    BlueprintView,
    DamagedBlob,
    GarbageReport,
    GatewayView,
    HistoryEntry,
    PackageView,
    RolloutView,
    Share,
    StageView,
    Standing,
    VariantView,
    VersionView,
)
from slmops.contracts.commands.rollout import GatewayProblem
from slmops.contracts.errors import Problem
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.prompts.evaluation_data import EvaluationData
from slmops.kit.bus.deadletters import DeadLetter


def answer(text: str) -> Text:
    return cell(text)


# ---- models -----------------------------------------------------------------------------------------------


def versions(views: Sequence[VersionView], now: datetime, width: int) -> RenderableType:
    columns: list[Column[VersionView]] = [
        Column("model", lambda v: v.model),
        Column("version", lambda v: v.version),
        Column("stage", lambda v: state("retired" if v.state == "retired" else v.stage)),
        Column("size", lambda v: size(v.size_bytes), right=True),
        Column("format", lambda v: cell(v.format), wide=True),
        Column("architecture", lambda v: cell(v.architecture), wide=True),
        Column("digest", lambda v: short(v.digest), wide=True),
        Column("aliases", lambda v: ", ".join(v.aliases)),
        Column("age", lambda v: duration(now - v.at), right=True),
        Column("progress", lambda v: cell(v.progress), fold=True),
    ]
    nothing = "No models yet. Push one: slmops model push PATH --name NAME --version 1.0.0"
    return or_else(table(views, columns, width), nothing)


def version(view: VersionView, now: datetime, width: int) -> RenderableType:
    facts = pairs(
        [
            ("model", f"{view.model}:{view.version}"),
            ("stage", state(view.stage)),
            ("state", view.state),
            ("aliases", ", ".join(view.aliases)),
            ("format", f"{view.format}, {view.architecture}"),
            ("size", size(view.size_bytes)),
            ("digest", view.digest),
            ("registered", moment(view.at, now)),
            ("evaluated on", own_data(view.data)),
            ("progress", view.progress),
        ]
    )
    parts: list[RenderableType] = [facts]
    if view.variants:
        parts += ["", variants(view.variants, width)]
    if view.packages:
        parts += ["", _packages(view.packages, now)]
    return Group(*parts)


def own_data(data: EvaluationData | None) -> str:
    """Names own texts and tasks; empty if the bundled ones are used."""
    if data is None:
        return ""
    kinds = {"texts": data.texts, "calibration texts": data.calibration_texts, "tasks": data.tasks}
    named = {kind: [PurePosixPath(file.path).name for file in files] for kind, files in kinds.items() if files}
    return printable("; ".join(f"{kind} {', '.join(names)}" for kind, names in named.items()))


def variants(views: Sequence[VariantView], width: int) -> RenderableType:
    columns: list[Column[VariantView]] = [
        Column("version", lambda v: f"{v.model}:{v.version}"),
        Column("profile", lambda v: v.profile, wide=True),
        Column("recipe", lambda v: v.recipe),
        Column("gate", lambda v: state("chosen" if v.chosen else v.gate)),
        _measured("size", lambda e: size(e.bytes)),
        _measured("KL", lambda e: interval(e.kl, e.kl_low, e.kl_high, ".3f") if width >= WIDE else figure(e.kl, ".3f")),
        _measured("top-1", lambda e: figure(e.top1, ".1%")),
        _measured("ppl", lambda e: figure(e.ppl, ".1f"), wide=True),
        _measured("tok/s", lambda e: figure(e.tokens_per_s, ".0f")),
        _measured("TTFT", lambda e: figure(e.ttft_s, ".2f", " s"), wide=True),
        _measured("RSS", lambda e: size(e.peak_rss_bytes), wide=True),
    ]
    if not views:
        return Text("No variants yet.", style="dim")
    # Reasons are the most important text and too long for a column, so they are printed below the table.
    reasons = pairs((f"{v.model}:{v.version} {v.recipe}", v.reason) for v in views)
    return Group(table(views, columns, width), "", reasons)


def _measured(heading: str, cell: Callable[[Evaluation], str], wide: bool = False) -> Column[VariantView]:
    return Column(heading, lambda v: cell(v.evaluation) if v.evaluation else "", right=True, wide=wide)


def _packages(views: Sequence[PackageView], now: datetime) -> RenderableType:
    columns: list[Column[PackageView]] = [
        Column("package for", lambda p: p.profile),
        Column("recipe", lambda p: p.recipe),
        Column("size", lambda p: size(p.size_bytes), right=True),
        Column("age", lambda p: duration(now - p.at), right=True),
    ]
    return Group(table(views, columns), "", pairs((f"package {p.profile}", p.manifest.digest) for p in views))


# ---- blueprints and rollouts ------------------------------------------------------------------------------


def blueprints(views: Sequence[BlueprintView], now: datetime) -> RenderableType:
    columns: list[Column[BlueprintView]] = [
        Column("blueprint", lambda b: b.spec.name),
        Column("revision", lambda b: str(b.revision), right=True),
        Column("model", lambda b: b.spec.model),
        Column("profile", lambda b: b.spec.profile),
        Column("stable", lambda b: b.stable.version if b.stable else "none"),
        Column("age", lambda b: duration(now - b.at), right=True),
        Column("stages", lambda b: cell(" → ".join(map(_scope, b.spec.stages))), fold=True),
    ]
    return or_else(table(views, columns), "No blueprints yet. Apply one: slmops blueprint apply FILE")


def _scope(stage: Stage) -> str:
    labels = ",".join(f"{key}={value}" for key, value in sorted(stage.selector.items()))
    share = f"{stage.percent:g}%" if stage.percent < 100 or not labels else ""
    return " ".join(part for part in (stage.name, share, labels) if part)


def rollouts(views: Sequence[RolloutView], now: datetime, width: int) -> RenderableType:
    columns: list[Column[RolloutView]] = [
        Column("blueprint", lambda r: r.blueprint),
        Column("release", lambda r: f"{r.model}:{r.version}"),
        Column("state", lambda r: state(r.state)),
        Column("stage", lambda r: cell(_stage(r))),
        Column("took", lambda r: duration((r.ended_at or now) - r.started_at), right=True),
        Column("age", lambda r: duration(now - r.started_at), right=True, wide=True),
        Column("rollout", lambda r: cell(r.rollout), wide=True),
        Column("reason", lambda r: cell(r.reason), fold=True),
    ]
    return or_else(table(views, columns, width), "No rollouts yet. Start one: slmops rollout start BLUEPRINT")


def history(entries: Sequence[HistoryEntry]) -> RenderableType:
    columns: list[Column[HistoryEntry]] = [
        Column("at", lambda e: f"{e.at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"),
        Column("event", lambda e: cell(e.event.removeprefix("slmops.").removesuffix(".v1"))),
        Column("by", lambda e: cell(e.actor or "rollout service")),
        Column("rollout", lambda e: cell(e.rollout)),
        Column("reason", lambda e: cell(e.reason), fold=True),
    ]
    return or_else(table(entries, columns), "Nothing happened to this blueprint.")


def _stage(view: RolloutView) -> str:
    return f"{view.stage + 1}/{len(view.stages)} {view.stages[view.stage].name}"


def rollout(view: RolloutView, now: datetime) -> RenderableType:
    """Renders one rollout: its state, its stages in numbers, and the few gateways that need attention."""
    head = pairs(
        [
            ("rollout", view.rollout),
            ("updates", f"{view.blueprint} to {view.model}:{view.version}"),
            ("state", state(view.state)),
            ("took", duration((view.ended_at or now) - view.started_at)),
            ("reason", view.reason),
        ]
    )
    columns: list[Column[tuple[int, StageView]]] = [
        Column("stage", lambda s: cell(s[1].name, "bold" if s[0] == view.stage and not view.ended_at else "")),
        Column("targets", lambda s: str(s[1].targets), right=True),
        Column("committed", lambda s: str(s[1].committed), right=True),
        Column("failed", lambda s: cell(s[1].failed, "red" if s[1].failed else ""), right=True),
        Column("waiting for", lambda s: cell(s[1].waiting), fold=True),
    ]
    parts: list[RenderableType] = [head, "", table(list(enumerate(view.stages)), columns)]
    if view.attention:
        parts += ["", _attention(view.attention, now)]
    return Group(*parts)


def _attention(gateways: Sequence[GatewayProblem], now: datetime) -> RenderableType:
    """Renders the gateways of a rollout that failed or wait."""
    columns: list[Column[GatewayProblem]] = [
        Column("gateway", lambda g: cell(g.gateway_id)),
        Column("stage", lambda g: cell(g.stage)),
        Column("state", lambda g: state("failed" if g.failed else "waiting")),
        Column("seen", lambda g: duration(now - g.last_seen) if g.last_seen else "never", right=True),
        Column("problem", lambda g: cell(g.problem), fold=True),
    ]
    return table(gateways, columns)


def rollout_line(view: RolloutView) -> str:
    """Renders a rollout in one line, for a log."""
    stage = view.stages[view.stage]
    reached = f"{stage.committed} of {stage.targets} committed, {stage.failed} failed"
    more = [text for text in (view.reason, stage.waiting and f"waiting for {stage.waiting}") if text]
    return printable(f"{view.state}, stage {_stage(view)}: {'; '.join([reached, *more])}")


# ---- gateways ---------------------------------------------------------------------------------------------


def gateways(views: Sequence[GatewayView], apis: Mapping[str, str], now: datetime, width: int) -> RenderableType:
    """Renders gateways. `apis` maps the ids of those on this machine to the addresses of their APIs."""
    return or_else(
        table(views, _gateway_columns(now, apis), width),
        "No such gateways. A gateway appears here after it has enrolled.",
    )


def _gateway_columns(now: datetime, apis: Mapping[str, str] | None = None) -> list[Column[GatewayView]]:
    api = [Column[GatewayView]("API", lambda g: cell(apis.get(g.gateway_id, "")))] if apis else []
    return [
        Column("gateway", lambda g: g.gateway_id),
        Column("blueprint", lambda g: g.blueprint, wide=True),
        Column("labels", lambda g: cell(_labels(g)), wide=True),
        Column("phase", lambda g: state(_phase(g))),
        Column("running", lambda g: f"{g.running_version or 'nothing'}{'' if g.running == g.desired else ' *'}"),
        Column("tok/s", lambda g: figure(g.measured.get("tokens_per_s"), ".0f"), right=True),
        Column("seen", lambda g: duration(now - g.last_seen), right=True),
        *api,
        Column(
            "problem",
            lambda g: cell(_trouble(g)),
            fold=True,
        ),
    ]


def _phase(g: GatewayView) -> str:
    """Returns how far the gateway is with its update; for one that does not count, why it does not."""
    return g.phase.value if g.standing is Standing.ENROLLED else g.standing.value


def _trouble(g: GatewayView) -> str:
    return _why_not_counted(g) or (g.problem.what if g.problem else _wrong_clock(g))


def _why_not_counted(g: GatewayView) -> str:
    if g.standing is Standing.REVOKED:
        return f"revoked: {g.revoked_because}" if g.revoked_because else "revoked"
    return f"moving to {g.moving_to}" if g.standing is Standing.MOVING else ""


def _wrong_clock(g: GatewayView) -> str:
    ahead = timedelta(seconds=g.clock_ahead_s) if g.clock_ahead_s is not None else None
    return f"its clock is {clock_text(ahead)}" if ahead is not None and is_wrong(ahead) else ""


def _labels(g: GatewayView) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(g.labels.items()))


def _dropped(g: GatewayView) -> str | None:
    """Returns what the gateway dropped because it waited too long for a network; None if nothing."""
    if not (g.dropped_reports or g.dropped_measurements):
        return None
    return f"{g.dropped_reports} reports, {g.dropped_measurements} measurements: they waited too long for a network"


def _is_allowed(g: GatewayView, now: datetime) -> bool:
    return g.reenrol_until is not None and now < g.reenrol_until


def gateway(g: GatewayView, api: str | None, now: datetime) -> RenderableType:
    facts: list[tuple[str, Cell | None]] = [
        ("gateway", g.gateway_id),
        ("blueprint", g.blueprint),
        ("labels", _labels(g)),
        ("state", state(g.standing.value)),
        ("revoked", moment(g.revoked_at, now) if g.revoked_at else None),
        ("reason", g.revoked_because),
        ("moving to", g.moving_to),
        ("another key until", f"{g.reenrol_until:%Y-%m-%d %H:%M} UTC" if _is_allowed(g, now) else None),
        ("credential until", f"{g.credential_expires_at:%Y-%m-%d}" if g.credential_expires_at else None),
        ("phase", state(g.phase.value)),
        ("running", g.running_version or "nothing"),
        ("running package", g.running),
        ("target package", g.target),
        ("desired package", g.desired),
        *((f"  {field}", because) for field, because in sorted(g.desired_because.items())),
        ("plan", f"generation {g.plan_generation}"),
        *((name, f"{value:.4g}") for name, value in sorted(g.measured.items())),
        ("API", api),
        ("last seen", moment(g.last_seen, now)),
        ("clock", _wrong_clock(g)),
        ("dropped", _dropped(g)),
        ("attention", ", ".join(REASONS.get(reason, reason) for reason in g.attention)),
    ]
    parts: list[RenderableType] = [pairs(facts)]
    if g.problem is not None:
        parts += ["", problem_text(g.problem)]
    return Group(*parts)


# ---- storage ----------------------------------------------------------------------------------------------


def garbage(report: GarbageReport) -> RenderableType:
    rows = [
        ("in use", report.live, "named by a version, variant or package"),
        ("young", report.young, "not named yet, or no longer named; kept for the grace period"),
        ("garbage", report.garbage, "not named, and not used within the grace period"),
        ("uploads", report.uploads, "not registered within the grace period; removed with the garbage"),
    ]
    if report.removed is not None:
        rows.append(("removed", report.removed, "of the garbage"))
    columns: list[Column[tuple[str, Share, str]]] = [
        Column("blobs", lambda r: cell(r[0], "bold")),
        Column("number", lambda r: str(r[1].objects), right=True),
        Column("size", lambda r: size(r[1].size_bytes), right=True),
        Column("why", lambda r: cell(r[2]), fold=True),
    ]
    made = table(rows, columns)
    if not report.missing:
        return made
    lost = f"{report.missing} named blobs are missing in the store. Restore them: slmops storage verify --repair."
    return Group(made, "", cell(lost, "bold red"))


def damage(checked: Share, damaged: Sequence[DamagedBlob]) -> RenderableType:
    """Renders a verification of the store."""
    columns: list[Column[DamagedBlob]] = [
        Column("blob", lambda b: cell(b.digest)),
        Column("damage", lambda b: cell("restored" if b.restored else b.damage, "" if b.restored else "bold red")),
        Column("needed by", lambda b: cell(", ".join(b.needed_by) or "nothing"), fold=True),
    ]
    sound = f"{checked.objects} blobs verified, {size(checked.size_bytes)}"
    if not damaged:
        return cell(f"{sound}: none is damaged.")
    fixes = dict.fromkeys(blob.fix for blob in damaged if blob.fix)
    return Group(table(damaged, columns), "", cell(f"{sound}."), *map(cell, fixes))


# ---- dead letters -----------------------------------------------------------------------------------------


def dead_letters(letters: Sequence[DeadLetter], now: datetime, width: int) -> RenderableType:
    columns: list[Column[DeadLetter]] = [
        Column("seq", lambda d: str(d.sequence), right=True),
        # A consumer's name is its service, a slash, and the template of this subject.
        Column("subject", lambda d: cell(d.subject), fold=True),
        Column("consumer", lambda d: cell(d.consumer.partition("/")[0])),
        Column("code", lambda d: cell(d.code)),
        Column("size", lambda d: size(d.size_bytes), right=True),
        Column("age", lambda d: duration(now - d.at), right=True),
        Column("reason", lambda d: cell(d.reason), fold=True),
    ]
    return or_else(table(letters, columns, width), "No dead letters.")


def payload(sequence: int, text: str) -> RenderableType:
    return Group("", Text(f"payload of {sequence}", style="bold"), cell(text))


def removed(letters: Sequence[DeadLetter]) -> RenderableType:
    columns: list[Column[DeadLetter]] = [
        Column("removed", lambda d: str(d.sequence), right=True),
        Column("subject", lambda d: cell(d.subject), fold=True),
        Column("code", lambda d: cell(d.code)),
        Column("reason", lambda d: cell(d.reason), fold=True),
    ]
    return or_else(table(letters, columns), "No dead letters.")


def replayed(rows: Sequence[tuple[int, str, Problem | None]]) -> RenderableType:
    columns: list[Column[tuple[int, str, Problem | None]]] = [
        Column("seq", lambda r: str(r[0]), right=True),
        Column("subject", lambda r: cell(r[1])),
        Column("outcome", lambda r: problem_text(r[2]) if r[2] else cell("replayed", "green"), fold=True),
    ]
    return or_else(table(rows, columns), "No dead letters.")
