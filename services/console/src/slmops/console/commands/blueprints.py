"""`slmops blueprint`: the declared configuration of a class of gateways."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import ValidationError

from slmops.console.render import fleet as render
from slmops.console.session import Session, command
from slmops.contracts.blueprint import Blueprint
from slmops.contracts.commands import ApplyBlueprint, ListBlueprints
from slmops.contracts.errors import Denied, InvalidMessage, NotFound
from slmops.kit.clock import utc_now

app = typer.Typer(name="blueprint", help="Declare what a class of gateways should run.", no_args_is_help=True)
STDIN = "-"


def parse(text: str, where: str) -> Blueprint:
    """YAML or JSON, which is YAML too. Raises `InvalidMessage` that names every wrong field."""
    try:
        return Blueprint.model_validate(yaml.safe_load(text), extra="forbid")  # a misspelt field is no wish
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise InvalidMessage(
            f"this is neither YAML nor JSON: {problem}",
            where=where + line,
            fix="Write one field: value per line, indented by spaces; see slmops blueprint apply --help.",
        ) from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors())
        raise InvalidMessage(
            f"this is not a valid blueprint: {wrong}", where=where, fix="It needs at least a name and a model."
        ) from error


def read(file: str) -> Blueprint:
    """A blueprint from a file, or from standard input for `-`. Raises `InvalidMessage`, `NotFound`, `Denied`."""
    try:
        text = sys.stdin.read() if file == STDIN else Path(file).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound("there is no such file", where=file, fix="Check the path.") from error
    except UnicodeDecodeError as error:
        raise InvalidMessage("a blueprint is UTF-8 text", where=file) from error
    except OSError as error:
        raise Denied(f"the file cannot be read: {error.strerror}", where=file) from error
    return parse(text, "standard input" if file == STDIN else file)


@command(app, "apply", "slmops blueprint apply edge-chat.yaml", "cat edge-chat.json | slmops blueprint apply -")
async def apply(
    session: Session,
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML or JSON; - reads standard input.")],
) -> None:
    """Make this the newest revision of a blueprint. Applying the same again changes nothing."""
    spec = read(file)
    view = await (await session.client()).request(ApplyBlueprint(spec=spec))
    session.show(view, render.blueprints([view], utc_now()))


@command(app, "ls", "slmops blueprint ls", "slmops blueprint ls --json")
async def ls(session: Session) -> None:
    """All blueprints with their newest revision and what is stable."""
    answer = await (await session.client()).request(ListBlueprints())
    session.show(answer, render.blueprints(answer.blueprints, utc_now()))
