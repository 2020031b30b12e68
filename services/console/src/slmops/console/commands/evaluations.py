"""`slmops eval`: the measurements of a variant, their evidence, and their verification."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import typer
from pydantic import BaseModel

from slmops.console.commands.jobs import find_job_id
from slmops.console.commands.uploading import VERIFY_STORE
from slmops.console.render import optimizer as render
from slmops.console.session import Session, command
from slmops.contracts.commands import EvaluationFiles, FetchEvaluation, VerifyEvaluation
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import Denied, DigestMismatch, InvalidVersion, Unreachable
from slmops.contracts.manifest import PackageFile
from slmops.contracts.names import check_name, check_version
from slmops.contracts.permissions import ANSWER_WITHIN
from slmops.kit.tls import untrusted

app = typer.Typer(name="eval", help="Show evaluations with their evidence, and verify them.", no_args_is_help=True)
NOT_CONFIRMED = 1
"""Exit code of `verify` when figures or files differ from the report."""
Profile = Annotated[str | None, typer.Option(help="Device profile, if there are several.", show_default=False)]


class Evaluated(BaseModel):
    """The stored report, and URLs of the report and its pictures, valid for 15 minutes."""

    report: dict[str, Any]
    files: EvaluationFiles


class _Named(NamedTuple):
    model: str
    version: str
    recipe: str | None


def parse(reference: str) -> _Named:
    """Parses `MODEL:VERSION` or `MODEL:VERSION:RECIPE`. Raises `InvalidName`, `InvalidVersion`."""
    parts = reference.split(":")
    if len(parts) not in (2, 3):
        raise InvalidVersion(
            f"{reference!r} does not name an evaluation", fix="Write MODEL:VERSION or MODEL:VERSION:RECIPE."
        )
    recipe = check_name(parts[2], "recipe name") if len(parts) == 3 else None
    return _Named(check_name(parts[0], "model name"), check_version(parts[1]), recipe)


@command(
    app,
    "show",
    "slmops eval show smollm2:1.0.0:int4",
    "slmops eval show 5f0c9d5e --save front/",
)
async def show(
    session: Session,
    reference: Annotated[
        str,
        typer.Argument(
            metavar="MODEL:VERSION[:RECIPE]|JOB", help="A variant (default: the chosen one), or all variants of a job."
        ),
    ],
    profile: Profile = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Save the report, and the pictures of a search.")
    ] = None,
) -> None:
    """Show the figures of a variant with their 95% intervals and the evidence."""
    named = parse(reference) if ":" in reference else None
    client = await session.client()
    if named:
        asked = FetchEvaluation(**named._asdict(), profile=_check_profile(profile))
    else:
        asked = FetchEvaluation(job=await find_job_id(client, reference))
    found = await client.request(asked)
    data = await _fetch(found.report, session.verify)
    if save is not None:
        await _save(found, data, save, session.verify)
    report = json.loads(data)
    session.show(Evaluated(report=report, files=found), render.evaluation(report))


@command(app, "verify", "slmops eval verify smollm2:1.0.0:int4", "slmops eval verify sha256:… --json")
async def verify(
    session: Session,
    reference: Annotated[
        str, typer.Argument(metavar="MODEL:VERSION[:RECIPE]|DIGEST", help="A variant, or the digest of its report.")
    ],
    profile: Profile = None,
) -> int:
    """Measure a variant again from the stored files. Exits 1 if a figure or a file differs from the report."""
    if reference.startswith("sha256:"):
        asked = VerifyEvaluation(report=reference)
    else:
        asked = VerifyEvaluation(**parse(reference)._asdict(), profile=_check_profile(profile))
    answer = await (await session.client()).request(asked, timeout=ANSWER_WITHIN)
    session.show(answer, render.verification(answer))
    return 0 if answer.agrees else NOT_CONFIRMED


def _check_profile(profile: str | None) -> str | None:
    return check_name(profile, "profile name") if profile else None


async def _save(found: EvaluationFiles, report: bytes, folder: Path, verify: ssl.SSLContext | bool) -> None:
    contents = {found.report.path: report} | {file.path: await _fetch(file, verify) for file in found.pictures}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            (folder / Path(name).name).write_bytes(data)
    except OSError as error:
        raise Denied(f"cannot write the files: {error.strerror}", where=str(folder)) from error


async def _fetch(file: PackageFile, verify: ssl.SSLContext | bool) -> bytes:
    """Downloads and verifies a file. Raises `Unreachable`, `DigestMismatch`."""
    where = file.url.partition("?")[0]  # without the URL's signature
    try:
        async with httpx.AsyncClient(timeout=30, verify=verify) as http:
            answer = await http.get(file.url)
    except httpx.TransportError as error:
        refused = untrusted(error, where)
        raise refused or Unreachable(
            f"the object store does not answer: {type(error).__name__}", where=where
        ) from error
    if not answer.is_success:
        raise Unreachable(f"the object store answered {answer.status_code}", where=where, fix="Try again.")
    if digest_of(answer.content) != file.descriptor.digest:
        what = "the object store returned a different file than the report names"
        raise DigestMismatch(what, where=where, fix=VERIFY_STORE)
    return answer.content
