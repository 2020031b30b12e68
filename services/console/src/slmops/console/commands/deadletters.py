"""`slmops dlq`: messages that a service gave up on."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Group

from slmops.console.render import fleet as render
from slmops.console.session import Session, command
from slmops.contracts.errors import InvalidMessage, Problem, SlmopsError
from slmops.kit.bus.deadletters import DeadLetter, dead_letter, dead_letters, replay
from slmops.kit.clock import utc_now

app = typer.Typer(name="dlq", help="Messages that a service gave up on: list and replay.", no_args_is_help=True)


class Row(DeadLetter):
    """A dead letter with its payload as text: only for somebody who asked for it."""

    text: str

    @classmethod
    def of(cls, letter: DeadLetter) -> Row:
        return cls(**dict(letter), text=letter.payload.decode(errors="replace"))


class DeadLetters(BaseModel):
    dead_letters: tuple[Row | DeadLetter, ...]


class Replayed(BaseModel):
    """`problem` None: published again, and no longer a dead letter."""

    sequence: int
    subject: str
    problem: Problem | None = None


class ReplayedList(BaseModel):
    replayed: tuple[Replayed, ...]


@command(app, "ls", "slmops dlq ls", "slmops dlq ls --show-payload --json")
async def ls(
    session: Session,
    show_payload: Annotated[
        bool, typer.Option("--show-payload", help="Also what the messages say, which may be private.")
    ] = False,
) -> None:
    """All dead letters, oldest first: who gave up on what, and why."""
    found = [letter async for letter in dead_letters(await session.client())]
    rows = [Row.of(letter) for letter in found] if show_payload else found
    table = render.dead_letters(found, utc_now(), session.out.width)
    payloads = [render.payload(row.sequence, row.text) for row in rows if isinstance(row, Row)]
    session.show(DeadLetters(dead_letters=tuple(rows)), Group(table, *payloads))


@command(app, "replay", "slmops dlq replay 17", "slmops dlq replay --all")
async def replay_command(
    session: Session,
    sequence: Annotated[int | None, typer.Argument(metavar="[SEQ]", help="As `dlq ls` shows it.", min=1)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All there are now.")] = False,
) -> int:
    """Publish a dead letter again where it came from, and remove it.

    Consumers that handled it before skip it: it keeps its event id. One that fails again becomes a new dead letter.
    """
    if (sequence is None) is not everything:
        raise InvalidMessage("it is not clear what to replay", fix="Give one sequence number, or --all.")
    client = await session.client()
    chosen = [await dead_letter(client, sequence)] if sequence else [letter async for letter in dead_letters(client)]
    done, code = [], 0
    for letter in chosen:
        problem = None
        try:
            await replay(client, letter)
        except SlmopsError as error:  # the others may still succeed
            problem, code = Problem.of(error), error.exit_code
        done.append(Replayed(sequence=letter.sequence, subject=letter.subject, problem=problem))
    session.show(
        ReplayedList(replayed=tuple(done)), render.replayed([(r.sequence, r.subject, r.problem) for r in done])
    )
    return code
