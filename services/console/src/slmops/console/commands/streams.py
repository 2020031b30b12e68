"""`slmops stream`: usage and limits of the bus's streams, and messages that their consumers missed."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer
from nats.js.api import ConsumerInfo, StreamInfo
from nats.js.errors import APIError
from pydantic import BaseModel

from slmops.console.render import stream as render_stream
from slmops.console.render.stream_view import AcceptedGap, ConsumerView, StreamView
from slmops.console.session import Session, command
from slmops.contracts.errors import DiskFull, IllegalTransition, InvalidMessage, NotFound
from slmops.contracts.subjects import STREAMS, StreamSpec, spec_of
from slmops.kit.bus import gaps
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.gaps import Durable, answering, gap_of
from slmops.kit.clock import utc_now
from slmops.kit.sizes import parse_size, size_text

app = typer.Typer(
    name="stream", help="Show and change streams of the bus: usage, limits, missed messages.", no_args_is_help=True
)
NO_STORAGE = 10047
"""The server's error code when it cannot reserve the space for a stream."""
StreamName = Annotated[str, typer.Argument(metavar="STREAM", help="Name from `stream ls`, for example EVENTS.")]


class StreamList(BaseModel):
    streams: tuple[StreamView, ...]


class Accepted(BaseModel):
    accepted: tuple[AcceptedGap, ...]


async def stream_views(client: BusClient) -> list[StreamView]:
    """Returns every stream with its consumers, as on the server. Raises `Unreachable`, `NotReady`."""
    return [await stream_view(client, spec) for spec in STREAMS]


async def stream_view(client: BusClient, spec: StreamSpec) -> StreamView:
    """Returns one stream with its consumers. Raises `Unreachable`, `NotReady`."""
    with answering(Durable(spec.name, "")):
        info = await client.js.stream_info(spec.name)
        consumers = await client.js.consumers_info(spec.name)
    return _view(spec, info, consumers)


def _view(spec: StreamSpec, info: StreamInfo, consumers: list[ConsumerInfo]) -> StreamView:
    limit, age = info.config.max_bytes or -1, info.config.max_age or 0
    return StreamView(
        name=spec.name,
        subjects=tuple(info.config.subjects or ()),
        messages=info.state.messages,
        size_bytes=info.state.bytes,
        limit_bytes=limit if limit > 0 else None,
        max_age=timedelta(seconds=age) if age else None,
        refuses=info.config.discard == "new",
        consumers=tuple(
            ConsumerView(name=c.name, pending=(c.num_pending or 0) + (c.num_ack_pending or 0), gap=gap_of(c))
            for c in consumers
        ),
    )


async def resize(client: BusClient, name: str, size_bytes: int, *, force: bool = False) -> StreamView:
    """Sets the size limit of a stream.

    Raises `NotFound`, `InvalidMessage`, `IllegalTransition`, `DiskFull`, `Unreachable`.
    """
    spec = _known_spec(name)
    with answering(Durable(name, "")):
        info = await client.js.stream_info(name)
        _check(spec, info, size_bytes, force)
        try:
            await client.js.update_stream(info.config.evolve(max_bytes=size_bytes))
        except APIError as error:
            if error.err_code != NO_STORAGE:
                raise
            raise DiskFull(
                f"the NATS server cannot reserve {size_text(size_bytes)} for {name}: {error.description}",
                where=name,
                fix="Choose a smaller size, or increase the server's max_file_store.",
            ) from error
    return await stream_view(client, spec)


def _known_spec(name: str) -> StreamSpec:
    spec = spec_of(name)
    if spec is None:
        raise NotFound(f"there is no stream {name}", fix=f"Use one of: {', '.join(s.name for s in STREAMS)}.")
    return spec


def _check(spec: StreamSpec, info: StreamInfo, size_bytes: int, force: bool) -> None:
    limit = info.config.max_bytes or -1
    if 0 < limit <= size_bytes:
        return
    if (
        spec.refuses and size_bytes < info.state.bytes
    ):  # the server would drop the oldest messages, although this stream must not lose any
        raise IllegalTransition(
            f"{spec.name} holds {size_text(info.state.bytes)}; a limit of {size_text(size_bytes)} would drop messages",
            where=spec.name,
            fix=f"Choose a size above {size_text(info.state.bytes)}.",
        )
    if not force:
        present = size_text(limit) if limit > 0 else "unlimited"
        raise InvalidMessage(
            f"{size_text(size_bytes)} is below the current limit of {spec.name}, {present}",
            where=spec.name,
            fix="Choose a larger size, or add --force.",
        )


@command(app, "ls", "slmops stream ls", "slmops stream ls --json")
async def ls(session: Session) -> None:
    """List every stream: its usage, what happens when it is full, and the position of its consumers."""
    views = await stream_views(await session.client())
    session.show(StreamList(streams=tuple(views)), render_stream.streams(views, session.out.width))


@command(app, "resize", "slmops stream resize EVENTS 2GiB")
async def resize_command(
    session: Session,
    name: StreamName,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="The new limit: 2GiB, 512MiB.")],
    force: Annotated[bool, typer.Option("--force", help="Also allow a smaller limit.")] = False,
) -> None:
    """Set the size limit of a stream. At their next start, services raise a limit that is below their own setting."""
    size_bytes = parse_size(size)
    view = await resize(await session.client(), name, size_bytes, force=force)
    session.show(view, render_stream.streams([view], session.out.width))


@command(app, "accept", "slmops stream accept EVENTS")
async def accept(session: Session, name: StreamName) -> None:
    """Accept that a stream's consumers missed messages, so that blocked work continues.

    Restore what can be restored first. After a gap of EVENTS is accepted, `slmops storage gc` removes blobs that only
    the lost events name.
    """
    spec = _known_spec(name)
    found = await gaps.accept(await session.client(), spec.name)
    rows = [AcceptedGap(stream=d.stream, consumer=d.consumer, **dict(gap)) for d, gap in found]
    session.show(Accepted(accepted=tuple(rows)), render_stream.accepted(rows, utc_now()))
