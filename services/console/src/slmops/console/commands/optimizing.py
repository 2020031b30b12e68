"""`slmops optimize`: makes variants of a version by chosen recipes or by a search for better recipes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from slmops.console.commands.evaluation_data import CalibrationTexts, Tasks, Texts, read_data, upload_data
from slmops.console.commands.recipes import read_recipe
from slmops.console.commands.uploading import StoreWait
from slmops.console.poll import poll
from slmops.console.render import optimizer as render
from slmops.console.render.progress import ProgressReporter
from slmops.console.session import Session, command
from slmops.contracts.commands import ListJobs, Optimize
from slmops.contracts.errors import InvalidMessage, OptimizationFailed
from slmops.contracts.jobs import JobState, JobView
from slmops.contracts.names import check_name, parse_model_ref
from slmops.contracts.recipe import Recipe
from slmops.contracts.search import Prefer, SearchSpec
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import utc_now

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_RECIPE_FILES = (".yaml", ".yml", ".json")


def duration(text: str) -> timedelta:
    """Parses a duration such as `90s`, `30m`, `2h` or `1d`. Raises `InvalidMessage`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found or not float(found[1]):
        raise InvalidMessage(f"{text!r} is not a duration", fix="Write a number and a unit: 90s, 30m, 2h or 1d.")
    return timedelta(seconds=float(found[1]) * _UNITS[found[2]])


def recipes(given: Sequence[str]) -> tuple[tuple[str, ...], tuple[Recipe, ...]]:
    """Returns the names of bundled recipes and the recipes read from files. Raises what `read_recipe` raises."""
    files = [text for text in given if text.endswith(_RECIPE_FILES) or "/" in text]
    names = [check_name(text, "recipe name") for text in given if text not in files]
    return tuple(names), tuple(read_recipe(Path(text)) for text in files)


def search_spec(wanted: bool, budget: str | None, prefer: str | None, max_trials: int | None) -> SearchSpec | None:
    """Returns the search settings, None without a search. Raises `InvalidMessage` for an option without `wanted`."""
    given = {"budget": duration(budget) if budget else None, "prefer": prefer, "max_trials": max_trials}
    fields = {name: value for name, value in given.items() if value is not None}
    if wanted:
        return SearchSpec.model_validate(fields)
    if fields:
        option = next(iter(fields)).replace("_", "-")
        raise InvalidMessage(f"--{option} needs --search", fix=f"Add --search, or leave out --{option}.")
    return None


async def wait_until_done(
    client: BusClient, job: str, on_change: Callable[[JobView], None] = lambda view: None
) -> JobView:
    """Waits until a job is done. Raises `OptimizationFailed` if no variant passed, or the job's own problem."""
    last: JobView | None = None
    async for view in poll(lambda: _job(client, job)):
        if view != last:
            on_change(view)
        last = view
        if view.state is JobState.DONE:
            return view
        if view.problem is not None and view.state.ended:
            raise view.problem.error()
        if view.state.ended:
            fix = f"Show the variants: slmops variant ls {view.model}:{view.version}."
            raise OptimizationFailed(view.reason or f"the job is {view.state}", where=view.job, fix=fix)
    raise AssertionError("poll never ends")


async def _job(client: BusClient, job: str) -> JobView:
    return (await client.request(ListJobs(job=job))).jobs[0]


def declare(app: typer.Typer) -> None:
    """Adds the command to `app` itself, because it has no group."""
    command(
        app,
        "optimize",
        "slmops optimize smollm2:1.0.0 --recipe int4-calibrated --recipe my.yaml --wait",
        "slmops optimize smollm2:1.0.0 --texts support-mails.jsonl --tasks products.jsonl",
        "slmops optimize smollm2:1.0.0 --search --budget 30m --prefer smallest --wait",
    )(optimize)


async def optimize(
    session: Session,
    reference: Annotated[str, typer.Argument(metavar="MODEL:VERSION", help="A registered version.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="A bundled recipe or a YAML file; may be repeated.", show_default=False),
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Device profile.", show_default=False)] = None,
    search: Annotated[bool, typer.Option("--search", help="Search for better recipes, starting from these.")] = False,
    budget: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Time limit of the search: 90s, 30m, 2h.", show_default=False),
    ] = None,
    prefer: Annotated[
        Prefer | None, typer.Option(help="Which of the variants that pass is chosen.", show_default=False)
    ] = None,
    max_trials: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of trials of the search.", show_default=False)
    ] = None,
    texts: Texts = None,
    calibration_texts: CalibrationTexts = None,
    tasks: Tasks = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the job is done; fail if no variant passes.")
    ] = False,
) -> None:
    """Make and measure variants of a version.

    A job that is already waiting or running is not started twice, and earlier measurements are reused. Without own
    texts and tasks, those of the version are used, or else the bundled ones.
    """
    model, version = parse_model_ref(reference)
    names, definitions = recipes(recipe or [])
    own = read_data(texts, calibration_texts, tasks)
    asked = Optimize(
        model=model,
        version=version,
        profile=check_name(profile, "profile name") if profile else None,
        recipes=names,
        definitions=definitions,
        search=search_spec(search, budget, prefer, max_trials),
    )
    client = await session.client(patient=wait)
    if own:
        with ProgressReporter(session) as progress:
            upload = await upload_data(
                client, own, progress.bytes_done, StoreWait(session.settings.upload_patience, progress.status)
            )
        asked = asked.model_copy(update={"data": own.data, "upload": upload})
    view = await client.request(asked)
    if wait:
        with ProgressReporter(session) as progress:
            view = await wait_until_done(client, view.job, lambda v: progress.status(render.job_line(v)))
    session.show(view, render.job(view, utc_now()))
    if not wait:
        session.remark(f"\nSee its progress: slmops job ls\nCancel it: slmops job cancel {view.job}")
