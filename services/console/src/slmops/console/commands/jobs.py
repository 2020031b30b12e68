"""`slmops job`: optimization jobs."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from slmops.console.render import optimizer as render
from slmops.console.session import Session, command
from slmops.contracts.commands import CancelJob, ListJobs
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.names import check_name
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import utc_now

app = typer.Typer(name="job", help="List and cancel optimization jobs.", no_args_is_help=True)
_LIST = "List them: slmops job ls."
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id from `job ls`; its first characters are enough.")]


@command(app, "ls", "slmops job ls", "slmops job ls smollm2 --json")
async def ls(
    session: Session,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Only jobs of this model.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many jobs to show.")] = 100,
) -> None:
    """List the newest jobs of the last three months with their progress, newest last."""
    asked = ListJobs(model=check_name(model, "model name") if model else None, limit=limit)
    answer = await (await session.client()).request(asked)
    session.show(answer, render.jobs(answer.jobs, utc_now(), session.out.width))
    if answer.cursor is not None:
        session.remark(f"\nThere are older jobs: --limit {min(500, 2 * limit)}")


@command(app, "cancel", "slmops job cancel 5f0c9d5e")
async def cancel(
    session: Session,
    job: JobId,
) -> None:
    """Cancel a job. A running job stops within seconds; a waiting job never starts."""
    client = await session.client()
    view = await client.request(CancelJob(job=await find_job_id(client, job), by=str(client.sender)))
    session.show(view, render.job(view, utc_now()))


async def find_job_id(client: BusClient, beginning: str) -> str:
    """Returns the id of the only job whose id starts with `beginning`. Raises `InvalidMessage`, `NotFound`."""
    if not re.fullmatch(r"[0-9a-f-]{1,36}", beginning):
        raise InvalidMessage(f"{beginning!r} is not a job id", fix=_LIST)
    found, page = list[str](), await client.request(ListJobs(limit=500))
    while True:
        found += [view.job for view in page.jobs if view.job.startswith(beginning)]
        if page.cursor is None:
            break
        page = await client.request(ListJobs(limit=500, cursor=page.cursor))
    if len(found) > 1:
        raise InvalidMessage(f"{len(found)} job ids start with {beginning!r}", fix="Give more characters of the id.")
    if not found:
        raise NotFound(f"there is no job {beginning}", fix=_LIST)
    return found[0]
