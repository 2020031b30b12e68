"""`slmops package image`: builds a gateway's image with a package inside, on the operator's own Docker engine."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import RenderableType

from slmops.console.commands import blueprints
from slmops.console.commands.packages import TrustedKey
from slmops.console.image.buildcontext import Content, source_files, stream, wheels
from slmops.console.image.factory import Factory, read
from slmops.console.render.progress import ProgressReporter
from slmops.console.render.tables import pairs, size
from slmops.console.session import Session, command
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InvalidMessage

if TYPE_CHECKING:
    from slmops.console.image.engine import Engine, OnStep

BASE_IMAGE = "python:3.12-slim"
_NO_INDEX = {"PIP_NO_INDEX": "1"}


class BuiltImage(BaseModel):
    """A built image."""

    tag: str
    id: Digest
    size_bytes: int
    model: str
    version: str
    manifest: Digest
    base: str
    pushed: bool = False


def gateway_image(engine: Engine, base: str, source: Path, wheel_folder: Path | None, on_step: OnStep) -> str:
    """Builds a gateway's image from a checkout, on `base`, and returns its id. With wheels it needs no network.

    Raises `NotFound` if `source` is not a checkout, and what `Engine.build` raises.
    """
    content = source_files(source) | (wheels(wheel_folder) if wheel_folder else {})
    offline = {"network_mode": "none"} if wheel_folder else {}
    arguments = {"BASE_IMAGE": base} | (_NO_INDEX if wheel_folder else {})
    where = "deploy/docker/Dockerfile"
    return engine.build(stream(content), on_step, dockerfile=where, target="gateway", buildargs=arguments, **offline)


def package_image(
    engine: Engine, gateway: str, factory: Factory, tag: str, on_step: OnStep, *, base: str, blueprint: str | None
) -> str:
    """Adds the factory release to the image `gateway`, tags the result and returns its id. `base` goes into a label.

    Raises `InvalidMessage` if `gateway` is not a gateway's image, `NotFound` if it does not exist.
    """
    _check_gateway(gateway, engine.inspect(gateway)["Config"].get("Cmd"))
    return engine.build(
        stream(package_context(factory, blueprint), factory.created),
        on_step,
        tag=tag,
        buildargs={"GATEWAY_IMAGE": gateway},
        labels=factory.labels(base),
        network_mode="none",
    )


def package_context(factory: Factory, blueprint: str | None) -> dict[str, Content]:
    """Returns the build context: the Dockerfile, and below `device` the files at their paths on the device."""
    recipe = files("slmops.console").joinpath("data/factory.Dockerfile").read_text(encoding="utf-8")
    if blueprint:
        recipe += f"ENV SLMOPS_BLUEPRINT={blueprint}\n"
    brought = {f"device/opt/factory/{path}": content for path, content in factory.files().items()}
    return brought | {"Dockerfile": recipe.encode()}


def _check_gateway(image: str, starts: list[str] | None) -> None:
    if "slmops.gateway.app" not in (starts or []):
        raise InvalidMessage(
            "this image does not start a gateway", where=image, fix="Name an image built from deploy/docker/Dockerfile."
        )


def _view(tag: str, inspected: dict[str, Any], factory: Factory, base: str, pushed: bool) -> BuiltImage:
    release = factory.release
    return BuiltImage(
        tag=tag,
        id=inspected["Id"],
        size_bytes=inspected["Size"],
        model=release.model,
        version=release.version,
        manifest=release.manifest.digest,
        base=base,
        pushed=pushed,
    )


def _table(view: BuiltImage) -> RenderableType:
    return pairs(
        [
            ("image", view.tag),
            ("id", view.id),
            ("size", size(view.size_bytes)),
            ("model", f"{view.model}:{view.version}"),
            ("package", view.manifest),
            ("base", view.base),
            ("pushed", "yes" if view.pushed else ""),
        ]
    )


def declare(group: typer.Typer) -> None:
    """Adds the command to the group `package`."""
    command(
        group,
        "image",
        "slmops package image ./smollm2-1.0.0 --key trusted.pem --root root.json --blueprint edge-chat.yaml",
        "slmops package image ./smollm2-1.0.0 --key trusted.pem --root root.json --gateway gw:1 --tag edge:1 --push",
    )(image)


async def image(
    session: Session,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The package's folder: manifest, signature and files.")
    ],
    key: TrustedKey,
    root: Annotated[
        Path,
        typer.Option(
            help="Root of trust: metadata/1.root.json of the key ceremony. slmops up: keys/tuf/metadata/1.root.json."
        ),
    ],
    blueprint: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Blueprint file: how the package is probed and served.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[str, typer.Option(help="Base image of the gateway's image.")] = BASE_IMAGE,
    source: Annotated[Path, typer.Option(help="Checkout of slmops to build the gateway from.")] = Path(),
    wheel_folder: Annotated[
        Path | None,
        typer.Option(
            "--wheels", help="Folder with all wheels of the gateway, to build without a network.", show_default=False
        ),
    ] = None,
    gateway: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", help="Use this gateway image instead of building one.", show_default=False),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Default: slmops-MODEL:VERSION.", show_default=False)] = None,
    push: Annotated[bool, typer.Option("--push", help="Push the image to the registry in its tag.")] = False,
) -> None:
    """Build a gateway's image that contains this package.

    A device with the image can serve before it ever has a network. The package is verified before the build and again
    on the device, which trusts the same key and root.
    """
    from slmops.console.image.engine import Engine  # imports docker and requests, so only in this command

    spec = blueprints.read(blueprint) if blueprint else None
    factory = await asyncio.to_thread(read, directory, key, root, spec)
    name = tag or f"slmops-{factory.release.model}:{factory.release.version}"

    def work(on_step: OnStep) -> BuiltImage:
        with Engine() as engine:
            gateway_image_name = gateway or gateway_image(engine, base, source, wheel_folder, on_step)
            base_name = gateway or base
            named = spec.name if spec else None
            made = package_image(engine, gateway_image_name, factory, name, on_step, base=base_name, blueprint=named)
            if push:
                engine.push(name, on_step)
            return _view(name, engine.inspect(made), factory, base_name, push)

    with ProgressReporter(session) as progress:
        view = await asyncio.to_thread(work, progress.status)
    session.show(view, _table(view))
