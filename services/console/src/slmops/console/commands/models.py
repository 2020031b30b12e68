"""`slmops model` and `slmops variant`: models, their versions and their variants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from slmops.console.commands.evaluation_data import CalibrationTexts, Tasks, Texts, read_data
from slmops.console.commands.push import check, push
from slmops.console.commands.uploading import StoreWait
from slmops.console.poll import poll
from slmops.console.render import fleet as render
from slmops.console.render.progress import ProgressReporter
from slmops.console.session import Session, command
from slmops.contracts.commands import ListVersions, RetireVersion, SetAlias, VariantView, VersionView
from slmops.contracts.errors import NotFound, OptimizationFailed
from slmops.contracts.names import check_name, parse_model_ref
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import utc_now

__all__ = ["app", "find_versions", "push", "query", "variant_app", "wait_until_packaged"]

app = typer.Typer(name="model", help="Push models, show their state, name and retire versions.", no_args_is_help=True)
variant_app = typer.Typer(
    name="variant", help="List the variants that the optimizer made of a version.", no_args_is_help=True
)
Reference = Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="A model, or one version of it.")]


Version = Annotated[str, typer.Argument(metavar="NAME:VERSION", help="One version of a model.")]


class VariantList(BaseModel):
    variants: tuple[VariantView, ...]


def query(reference: str | None = None) -> ListVersions:
    """Returns the command that lists `NAME`, `NAME:VERSION` or all models. Raises `InvalidName`, `InvalidVersion`."""
    if reference is None:
        return ListVersions()
    if ":" not in reference:
        return ListVersions(model=check_name(reference, "model name"))
    name, version = parse_model_ref(reference)
    return ListVersions(model=name, version=version)


async def find_versions(client: BusClient, asked: ListVersions) -> tuple[VersionView, ...]:
    """Returns all versions by pages, newest last. Raises `NotFound` if a named model or version does not exist."""
    page = await client.request(asked)
    found = page.versions
    while page.cursor is not None:
        page = await client.request(asked.model_copy(update={"cursor": page.cursor}))
        found = (*page.versions, *found)
    if asked.model and not found:
        named = f"{asked.model}:{asked.version}" if asked.version else asked.model
        raise NotFound(f"there is no {named}", fix="List the models: slmops model ls.")
    return found


async def wait_until_packaged(
    client: BusClient, reference: str, on_change: Callable[[VersionView], None] = lambda view: None
) -> VersionView:
    """Waits until a version is packaged. Raises `OptimizationFailed` with the reasons if every variant was refused."""
    asked, last = query(reference), None
    async for view, *_ in poll(lambda: find_versions(client, asked)):
        if view != last:
            on_change(view)
        last = view
        if view.stage == "packaged":
            return view
        if view.stage == "refused":
            reasons = "; ".join(f"{v.recipe}: {v.reason}" for v in view.variants) or view.progress
            raise OptimizationFailed(
                f"no variant passed its gate. {reasons}",
                where=reference,
                fix=f"Show the variants: slmops variant ls {reference}.",
            )
    raise AssertionError("poll never ends")


@command(
    app,
    "push",
    "slmops model push SmolLM2-135M-Instruct.Q4_1.gguf --name smollm2 --version 1.0.0 --golden golden.jsonl --wait",
    "slmops model push ./adapter --base SmolLM2-135M-Instruct.Q4_1.gguf --name smollm2-support --version 1.0.0",
)
async def push_command(
    session: Session,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A GGUF file, or a Hugging Face, ONNX or adapter directory.")
    ],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    version: Annotated[str, typer.Option(help="MAJOR.MINOR.PATCH. A registered version cannot be changed.")],
    golden: Annotated[
        Path | None,
        typer.Option(help='File of golden prompts, one {"prompt": …, "expect": […], "max_tokens": …} per line.'),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Base model of an adapter: a GGUF file or a Hugging Face directory.")
    ] = None,
    texts: Texts = None,
    calibration_texts: CalibrationTexts = None,
    tasks: Tasks = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is packaged; fail if no variant passes.")] = False,
) -> None:
    """Register a model's files as a new version.

    A version is registered only after all its files are uploaded. Pushing the same files again changes nothing, except
    that files which the store has lost are uploaded again. Waits up to 5 minutes for an object store that does not
    answer. Own texts and tasks are used by all its optimizations.
    """
    own = read_data(texts, calibration_texts, tasks)
    check(path, name, version, golden, base)  # before connecting, so that a wrong file is reported without a system
    client = await session.client(patient=wait)
    with ProgressReporter(session) as progress:
        store = StoreWait(session.settings.upload_patience, progress.status)
        view = await push(client, path, name, version, golden, progress.bytes_done, base, store, own)
        if wait:
            view = await wait_until_packaged(
                client, f"{name}:{version}", lambda v: progress.status(f"{v.stage} {v.progress}".strip())
            )
    session.show(view, render.version(view, utc_now(), session.out.width))
    if not wait:
        session.remark(f"\nFollow its progress: slmops model show {name}:{version}")


@command(app, "ls", "slmops model ls", "slmops model ls --json")
async def ls(
    session: Session, limit: Annotated[int, typer.Option(min=1, max=500, help="How many versions to show.")] = 100
) -> None:
    """List the newest versions of all models, newest last."""
    answer = await (await session.client()).request(ListVersions(limit=limit))
    session.show(answer, render.versions(answer.versions, utc_now(), session.out.width))
    if answer.cursor is not None:
        session.remark(f"\nThere are older versions: --limit {min(500, 2 * limit)}, or slmops model show NAME")


@command(app, "show", "slmops model show smollm2:1.0.0", "slmops model show smollm2 --json")
async def show(session: Session, reference: Reference) -> None:
    """Show one version (default: the newest) with its variants and packages."""
    asked = query(reference)
    view = (await find_versions(await session.client(), asked))[-1]
    session.show(view, render.version(view, utc_now(), session.out.width))


@command(app, "alias", "slmops model alias smollm2:1.0.0 production", "slmops model alias smollm2:1.0.0 stable --json")
async def alias(
    session: Session,
    reference: Version,
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="The moving name, such as production.")],
) -> None:
    """Point an alias of a model to one of its versions. The registry keeps the history."""
    model, version = parse_model_ref(reference)
    asked = SetAlias(model=model, version=version, alias=check_name(name, "alias"))
    view = await (await session.client()).request(asked)
    session.show(view, render.version(view, utc_now(), session.out.width))


@command(app, "retire", "slmops model retire smollm2:1.0.0 --reason 'superseded by 1.0.1'")
async def retire(
    session: Session,
    reference: Version,
    reason: Annotated[str, typer.Option(help="Reason; it is stored with the event.")] = "",
) -> None:
    """Retire a version: no alias can point to it, and `slmops storage gc` removes what only it needs.

    Gateways keep their package. This cannot be undone.
    """
    model, version = parse_model_ref(reference)
    view = await (await session.client()).request(RetireVersion(model=model, version=version, reason=reason))
    session.show(view, render.version(view, utc_now(), session.out.width))


@command(variant_app, "ls", "slmops variant ls smollm2:1.0.0", "slmops variant ls --json")
async def variant_ls(
    session: Session,
    reference: Annotated[
        str | None, typer.Argument(metavar="[NAME[:VERSION]]", help="A model or version.", show_default=False)
    ] = None,
) -> None:
    """List variants with their figures, the gate's decision, and the reason why one was chosen."""
    asked = query(reference)
    found = await find_versions(await session.client(), asked)
    answer = VariantList(variants=tuple(variant for version in found for variant in version.variants))
    session.show(answer, render.variants(answer.variants, session.out.width))
