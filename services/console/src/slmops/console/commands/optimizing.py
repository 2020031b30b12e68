"""`slmops optimize`: variants of a version by recipes of your choice, or by a search for better ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from slmops.console.commands.recipes import read_recipe
from slmops.console.poll import poll
from slmops.console.render import optimizer as render
from slmops.console.render.progress import Teller
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
    """`90s`, `30m`, `2h`, `1d`. Raises `InvalidMessage`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found or not float(found[1]):
        raise InvalidMessage(f"{text!r} is not a duration", fix="Write a number and a unit: 90s, 30m, 2h or 1d.")
    return timedelta(seconds=float(found[1]) * _UNITS[found[2]])


def recipes(given: Sequence[str]) -> tuple[tuple[str, ...], tuple[Recipe, ...]]:
    """Names of bundled recipes, and recipes that were read from files. Raises what `read_recipe` raises."""
    files = [text for text in given if text.endswith(_RECIPE_FILES) or "/" in text]
    names = [check_name(text, "recipe name") for text in given if text not in files]
    return tuple(names), tuple(read_recipe(Path(text)) for text in files)


def search_spec(wanted: bool, budget: str | None, prefer: str | None, max_trials: int | None) -> SearchSpec | None:
    """Raises `InvalidMessage` for an option of a search without one."""
    given = {"budget": duration(budget) if budget else None, "prefer": prefer, "max_trials": max_trials}
    fields = {name: value for name, value in given.items() if value is not None}
    if wanted:
        return SearchSpec.model_validate(fields)
    if fields:
        option = next(iter(fields)).replace("_", "-")
        raise InvalidMessage(f"--{option} is for a search only", fix="Add --search, or leave it out.")
    return None


async def ended(client: BusClient, job: str, on_change: Callable[[JobView], None] = lambda view: None) -> JobView:
    """Wait until a job is done. Raises `OptimizationFailed` when nothing passed, or the job's own problem."""
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
            fix = f"Look at it: slmops variant ls {view.model}:{view.version}."
            raise OptimizationFailed(view.reason or f"the job is {view.state}", where=view.job, fix=fix)
    raise AssertionError("poll goes on for ever")


async def _job(client: BusClient, job: str) -> JobView:
    return (await client.request(ListJobs(job=job))).jobs[0]


def declare(app: typer.Typer) -> None:
    """The command has no group: it belongs to `app` itself."""
    command(
        app,
        "optimize",
        "slmops optimize smollm2:1.0.0 --recipe int4-calibrated --recipe my.yaml --wait",
        "slmops optimize smollm2:1.0.0 --search --budget 30m --prefer smallest --wait",
    )(optimize)


async def optimize(
    session: Session,
    reference: Annotated[str, typer.Argument(metavar="MODEL:VERSION", help="A registered version.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="A bundled one, or a YAML file; may be repeated.", show_default=False),
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Device profile.", show_default=False)] = None,
    search: Annotated[bool, typer.Option("--search", help="Look for better recipes, beginning with those.")] = False,
    budget: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Of the search: 90s, 30m, 2h.", show_default=False)
    ] = None,
    prefer: Annotated[
        Prefer | None, typer.Option(help="Which of those that pass is chosen.", show_default=False)
    ] = None,
    max_trials: Annotated[int | None, typer.Option(min=1, help="Of the search.", show_default=False)] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is done, or fail if nothing passes.")] = False,
) -> None:
    """Make and measure variants of a version.

    While the same work is under way it is not begun again, and what was measured before is not measured again.
    """
    model, version = parse_model_ref(reference)
    names, definitions = recipes(recipe or [])
    asked = Optimize(
        model=model,
        version=version,
        profile=check_name(profile, "profile name") if profile else None,
        recipes=names,
        definitions=definitions,
        search=search_spec(search, budget, prefer, max_trials),
    )
    client = await session.client(patient=wait)
    view = await client.request(asked)
    if wait:
        with Teller(session) as teller:
            view = await ended(client, view.job, lambda v: teller.status(render.job_line(v)))
    session.show(view, render.job(view, utc_now()))
    if not wait:
        session.remark(f"\nSee how far it came: slmops job ls\nEnd it: slmops job cancel {view.job}")
