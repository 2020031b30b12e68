"""Renders jobs, recipes and evaluations as tables. Pure: current time and width are arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.text import Text

from slmops.console.render.tables import (
    Cell,
    Column,
    cell,
    duration,
    moment,
    or_else,
    pairs,
    printable,
    short,
    size,
    state,
    table,
)
from slmops.contracts.commands import ParameterView, PassView
from slmops.contracts.evaluation import Evaluation, Figure, Verification
from slmops.contracts.jobs import JobState, JobView
from slmops.contracts.recipe import Recipe

# ---- jobs -------------------------------------------------------------------------------------------------


def jobs(views: Sequence[JobView], now: datetime, width: int) -> RenderableType:
    columns: list[Column[JobView]] = [
        Column("job", lambda j: j.job[:8]),
        Column("version", lambda j: f"{j.model}:{j.version}"),
        Column("profile", lambda j: j.profile, wide=True),
        Column("state", lambda j: state(j.state.value)),
        Column("done", lambda j: f"{j.done}/{j.of}" if j.state is JobState.RUNNING else "", right=True),
        Column("age", lambda j: duration(now - j.queued_at), right=True),
        Column("recipes", lambda j: cell(_recipes(j)), fold=True, wide=True),
        Column("progress or result", lambda j: cell(_progress_or_result(j)), fold=True),
    ]
    return or_else(table(views, columns, width), "No jobs yet. Start one: slmops optimize MODEL:VERSION")


def job(view: JobView, now: datetime) -> RenderableType:
    return pairs(
        [
            ("job", view.job),
            ("optimizes", f"{view.model}:{view.version} for {view.profile}"),
            ("recipes", _recipes(view)),
            ("search", _search(view)),
            ("state", state(view.state.value)),
            ("progress", "" if view.state.ended else f"{view.step} {view.done}/{view.of}".strip()),
            ("worker", view.worker),
            ("queued", moment(view.queued_at, now)),
            ("reason", view.reason),
        ]
    )


def job_line(view: JobView) -> str:
    """Renders a job in one line, for somebody who waits for it."""
    return printable(
        f"{view.state} {_progress_or_result(view)} {view.done}/{view.of}" if view.step else str(view.state)
    )


def _recipes(view: JobView) -> str:
    return ", ".join(view.recipes)


def _search(view: JobView) -> str:
    found = view.search
    return f"{found.prefer.replace('_', ' ')}, {duration(found.budget)}, {found.max_trials} trials" if found else ""


def _progress_or_result(view: JobView) -> str:
    return view.step if view.state is JobState.RUNNING else view.reason


# ---- recipes ----------------------------------------------------------------------------------------------


def recipes(views: Sequence[Recipe]) -> RenderableType:
    columns: list[Column[Recipe]] = [
        Column("recipe", lambda r: r.name),
        Column("passes", lambda r: " → ".join(step.pass_ for step in r.passes)),
        Column("description", lambda r: cell(r.description), fold=True),
    ]
    return table(views, columns)


def recipe(view: Recipe) -> str:
    """Returns the recipe as YAML that can be saved. It is not put into a table, which would wrap it."""
    return printable(yaml.safe_dump(view.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip())


def passes(views: Sequence[PassView]) -> RenderableType:
    return Group(*(part for view in views for part in _pass(view)))


def _pass(view: PassView) -> Iterator[RenderableType]:
    yield Text.assemble((view.name, "bold"), f"  {view.takes} → {view.gives}")
    yield cell(view.description)
    columns: list[Column[ParameterView]] = [
        Column("  parameter", lambda p: f"  {p.name}"),
        Column("default", lambda p: cell("required" if p.required else _default(p.default))),
        Column("type", lambda p: cell(p.kind), fold=True),
        Column("", lambda p: cell(p.description), fold=True),
    ]
    if view.parameters:
        yield table(view.parameters, columns)
    yield ""


def _default(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---- evaluations ------------------------------------------------------------------------------------------


def evaluation(report: Mapping[str, Any]) -> RenderableType:
    """Renders the report of a variant, or of a job with several. Fields of later versions are not shown."""
    if "variants" in report:
        return _job_report(report)
    found = Evaluation.model_validate(report["evaluation"])
    text, files = report["evaluation_text"], report["variant_files"]
    evidence: list[tuple[str, Cell | None]] = [
        ("recipe", report["recipe"]["name"]),
        (
            "text",
            f"{text['name']}, {report['windows']} windows of {report['window_tokens']} tokens, {short(text['digest'])}",
        ),
        ("tasks", ", ".join(f"{task['name']} {short(task['digest'])}" for task in report["tasks"])),
        ("files", f"{len(files)}, of {size(sum(file['size_bytes'] for file in files))}"),
        ("intervals", report["intervals"]),
        ("seed", str(report["seed"])),
        ("tools", ", ".join(f"{tool} {version}" for tool, version in report["tools"].items())),
    ]
    return Group(pairs(_figures(found)), "", pairs(evidence))


def _figures(e: Evaluation) -> list[tuple[str, Cell | None]]:
    golden = f"{e.golden_passed} of {e.golden_total}" if e.golden_total else ""
    joules = f"{e.joules_per_token:.3g} J ({e.joules_source})" if e.joules_per_token is not None else ""
    return [
        ("size", size(e.bytes)),
        ("KL", interval(e.kl, e.kl_low, e.kl_high, ".4f")),
        ("top-1", interval(e.top1, e.top1_low, e.top1_high, ".1%")),
        (
            "perplexity",
            interval(e.ppl, e.ppl_low, e.ppl_high, ".2f") + f", reference {_number(e.reference_ppl, '.2f')}",
        ),
        *((f"task {name}", format(accuracy, ".1%")) for name, accuracy in e.tasks.items()),
        ("golden prompts", golden),
        ("repetition", _number(e.repetition, ".1%")),
        ("tokens/s", _number(e.tokens_per_s, ".0f")),
        ("first token", _number(e.ttft_s, ".3f") + " s" if e.ttft_s is not None else ""),
        ("peak memory", size(e.peak_rss_bytes)),
        ("per token", joules),
    ]


def interval(value: float | None, low: float | None, high: float | None, form: str) -> str:
    """Formats a value with its 95% interval, if there is one: `0.120 (0.110–0.140)`."""
    if value is None or low is None or high is None:
        return _number(value, form)
    return f"{value:{form}} ({low:{form}}–{high:{form}})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _job_report(report: Mapping[str, Any]) -> RenderableType:
    rows = [
        (one["recipe"], Evaluation.model_validate(one["evaluation"]), one)
        for one in report["variants"]
        if one["evaluation"]
    ]
    columns: list[Column[tuple[str, Evaluation, Any]]] = [
        Column("recipe", lambda r: cell(r[0])),
        Column("gate", lambda r: state("passed" if r[2]["verdict"]["passed"] else "refused")),
        Column("front", lambda r: "yes" if r[0] in report["front"]["recipes"] else ""),
        Column("size", lambda r: size(r[1].bytes), right=True),
        Column("KL", lambda r: _number(r[1].kl, ".4f"), right=True),
        Column("top-1", lambda r: _number(r[1].top1, ".1%"), right=True),
        Column("tok/s", lambda r: _number(r[1].tokens_per_s, ".0f"), right=True),
    ]
    return Group(table(rows, columns), "", cell(report["choice"]["reason"]))


def verification(found: Verification) -> RenderableType:
    columns: list[Column[Figure]] = [
        Column("figure", lambda f: f.name),
        Column("reported", lambda f: _number(f.reported, ".6g"), right=True),
        Column("measured again", lambda f: _number(f.found, ".6g"), right=True),
        Column("", lambda f: cell("agrees", "green") if f.agrees else cell("differs", "red")),
    ]
    facts: list[tuple[str, Cell | None]] = [
        ("verdict", cell("confirmed", "bold green") if found.agrees else cell("not confirmed", "bold red")),
        ("different files", ", ".join(found.differing)),
        ("different tools", ", ".join(found.tools)),
    ]
    return Group(table(found.figures, columns), "", pairs(facts))
