"""`slmops trust client`: a TUF client over plain HTTP, with the interface of TUF's conformance clients.

It stores trusted metadata file by file, as the specification says. (A gateway's own client accepts a state only as a
whole.) It exits with 1 after any failure, as the conformance clients do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel

from slmops.console.session import report_errors
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.tuf_names import Attack, refused
from slmops.kit.settings import TlsSettings, load

if TYPE_CHECKING:
    from slmops.kit.trust.http import HttpClient

app = typer.Typer(
    name="client",
    help="A TUF client over HTTP: init, refresh, download.",
    no_args_is_help=True,
    epilog="Example: slmops trust client --metadata-dir ./trusted --metadata-url http://HOST/tuf/metadata/ refresh",
)
_NAMES = ("as_json", "metadata_dir", "metadata_url", "target_name", "target_base_url", "target_dir")


class Downloaded(BaseModel):
    target: str
    file: Path


@app.callback()
def options(
    context: typer.Context,
    metadata_dir: Annotated[Path | None, typer.Option(help="Folder of the trusted metadata.")] = None,
    metadata_url: Annotated[str | None, typer.Option(help="URL of the metadata.")] = None,
    target_name: Annotated[str | None, typer.Option(help="The target to download.")] = None,
    target_base_url: Annotated[str | None, typer.Option(help="URL of the targets.")] = None,
    target_dir: Annotated[Path | None, typer.Option(help="Folder for downloaded targets.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")] = False,
) -> None:
    context.obj = dict(
        zip(_NAMES, (as_json, metadata_dir, metadata_url, target_name, target_base_url, target_dir), strict=True)
    )


@app.command(epilog="Example: slmops trust client --metadata-dir ./trusted init 1.root.json")
def init(context: typer.Context, trusted_root: Annotated[Path, typer.Argument(help="The root to trust.")]) -> None:
    """Start with a trusted root."""
    with report_errors(as_json=context.obj["as_json"], exit_code=1):
        _client(context).init(trusted_root)


@app.command(epilog="Example: slmops trust client --metadata-dir ./trusted --metadata-url URL refresh")
def refresh(context: typer.Context) -> None:
    """Update the trusted metadata."""
    with report_errors(as_json=context.obj["as_json"], exit_code=1):
        _client(context).refresh(_required_option(context, "metadata_url"))


@app.command(
    epilog="Example: slmops trust client --metadata-dir D --metadata-url U --target-name trust/rollout.json "
    "--target-base-url T --target-dir . download"
)
def download(context: typer.Context) -> None:
    """Update the trusted metadata, and download a target that it lists."""
    with report_errors(as_json=context.obj["as_json"], exit_code=1):
        name = _required_option(context, "target_name")
        found = _client(context).download(
            _required_option(context, "metadata_url"),
            name,
            _required_option(context, "target_base_url"),
            Path(_required_option(context, "target_dir")),
        )
        if found is None:
            raise refused(Attack.ARBITRARY_PACKAGE, "the repository does not list this target", where=name)
        print(Downloaded(target=name, file=found).model_dump_json() if context.obj["as_json"] else found)


def _client(context: typer.Context) -> HttpClient:
    from slmops.kit.trust.http import HttpClient

    return HttpClient(Path(_required_option(context, "metadata_dir")), load(TlsSettings).tls_ca)


def _required_option(context: typer.Context, name: str) -> str:
    """Returns an option of the group. Raises `InvalidMessage` if it is missing."""
    value = context.obj[name]
    if value is None:
        raise InvalidMessage(f"--{name.replace('_', '-')} is required", fix="Give it before the command's name.")
    return str(value)
