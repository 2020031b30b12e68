"""`slmops dlq`: dead letters, the messages that a service gave up on."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Group

from slmops.console.render import fleet as render
from slmops.console.session import Session, command
from slmops.contracts.errors import InvalidMessage, Problem, SlmopsError
from slmops.contracts.exit_codes import ExitCode
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.deadletters import DeadLetter, dead_letter, dead_letters, number_stored, remove, replay
from slmops.kit.clock import utc_now

app = typer.Typer(
    name="dlq", help="List, replay and remove dead letters: messages that a service gave up on.", no_args_is_help=True
)


Sequence = Annotated[int | None, typer.Argument(metavar="[SEQ]", help="Sequence number from `dlq ls`.", min=1)]


class Row(DeadLetter):
    """A dead letter with its payload as text. Only shown on request."""

    text: str

    @classmethod
    def of(cls, letter: DeadLetter) -> Row:
        return cls(**dict(letter), text=letter.payload.decode(errors="replace"))


class DeadLetters(BaseModel):
    dead_letters: tuple[Row | DeadLetter, ...]


class Replayed(BaseModel):
    """The outcome of one replay. `problem` is None if the message was published again and its dead letter removed."""

    sequence: int
    subject: str
    problem: Problem | None = None


class ReplayedList(BaseModel):
    """`left_out` are commands, which `--all` does not replay."""

    replayed: tuple[Replayed, ...]
    left_out: tuple[DeadLetter, ...] = ()


@command(app, "ls", "slmops dlq ls", "slmops dlq ls --show-payload --json")
async def ls(
    session: Session,
    show_payload: Annotated[
        bool, typer.Option("--show-payload", help="Also show the messages' content, which may be private.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many of the newest to show, at most.")] = 100,
) -> None:
    """List the newest dead letters, oldest first, with the consumer that gave up and the reason."""
    client = await session.client()
    stored = await number_stored(client)
    found = [letter async for letter in dead_letters(client, limit)]
    rows = [Row.of(letter) for letter in found] if show_payload else found
    table = render.dead_letters(found, utc_now(), session.out.width)
    payloads = [render.payload(row.sequence, row.text) for row in rows if isinstance(row, Row)]
    session.show(DeadLetters(dead_letters=tuple(rows)), Group(table, *payloads))
    if stored > len(found):
        session.remark(f"\n{len(found):,} of {stored:,} dead letters. Show older ones: --limit {10 * limit}")


@command(app, "rm", "slmops dlq rm 17", "slmops dlq rm --all --json")
async def rm(
    session: Session,
    sequence: Sequence = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all current dead letters.")] = False,
) -> None:
    """Remove a dead letter for good. Its message is lost: replay it instead if its effect is still wanted."""
    client, chosen = await _chosen(session, sequence, everything)
    for letter in chosen:
        await remove(client, letter)
    session.show(DeadLetters(dead_letters=tuple(chosen)), render.removed(chosen))


async def _chosen(session: Session, sequence: int | None, everything: bool) -> tuple[BusClient, list[DeadLetter]]:
    if (sequence is None) is not everything:
        raise InvalidMessage("specify which dead letters", fix="Give one sequence number, or --all.")
    client = await session.client()
    if sequence is not None:
        return client, [await dead_letter(client, sequence)]
    return client, [letter async for letter in dead_letters(client)]


@command(app, "replay", "slmops dlq replay 17", "slmops dlq replay 18 --yes", "slmops dlq replay --all")
async def replay_command(
    session: Session,
    sequence: Sequence = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Replay all current dead letters, except those of commands.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send a command, whose content you have read.")] = False,
) -> int:
    """Publish a dead letter again on its original subject, and remove it.

    It keeps its event id, so consumers that already handled it skip it. If it fails again, it is a new dead letter.
    A command is sent in your name. It is shown first, and sent only with --yes.
    """
    client, chosen = await _chosen(session, sequence, everything)
    commands = [letter for letter in chosen if letter.is_command]
    if commands and not everything and not yes:
        return _show_command(session, commands[0])
    done, code = [], 0
    left_out = commands if everything else []
    for letter in (letter for letter in chosen if letter not in left_out):
        problem = None
        try:
            await replay(client, letter)
        except SlmopsError as error:  # the others may still succeed
            problem, code = Problem.of(error), error.exit_code
        done.append(Replayed(sequence=letter.sequence, subject=letter.subject, problem=problem))
    session.show(
        ReplayedList(replayed=tuple(done), left_out=tuple(left_out)),
        render.replayed([(r.sequence, r.subject, r.problem) for r in done]),
    )
    if left_out:
        numbers = ", ".join(str(letter.sequence) for letter in left_out)
        session.remark(f"Commands are replayed one by one: slmops dlq replay SEQ. Left out: {numbers}")
    return code


def _show_command(session: Session, letter: DeadLetter) -> int:
    row = Row.of(letter)
    table = render.dead_letters([letter], utc_now(), session.out.width)
    session.show(DeadLetters(dead_letters=(row,)), Group(table, render.payload(row.sequence, row.text)))
    session.remark(
        f"This is a command, and it was not sent. Send it in your name: slmops dlq replay {letter.sequence} --yes"
    )
    return ExitCode.REFUSED
