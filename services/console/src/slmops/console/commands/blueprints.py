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
from slmops.console.yaml_document import load
from slmops.contracts.blueprint import Blueprint
from slmops.contracts.commands import ApplyBlueprint, ListBlueprints
from slmops.contracts.errors import Denied, InvalidMessage, NotFound
from slmops.kit.clock import utc_now

app = typer.Typer(name="blueprint", help="Declare what a class of gateways should run.", no_args_is_help=True)
STDIN = "-"


def parse(text: str, where: str) -> Blueprint:
    """Parses YAML, or JSON as a subset of YAML. Raises `InvalidMessage`, which names every wrong field."""
    try:
        return Blueprint.model_validate(load(text), extra="forbid")  # reject misspelt fields
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error) or "it cannot be parsed"
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
    """Reads a blueprint from a file or, for `-`, from standard input.

    Raises `InvalidMessage`, `NotFound`, `Denied`.
    """
    try:
        text = sys.stdin.read() if file == STDIN else Path(file).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound("there is no such file", where=file, fix="Check the path.") from error
    except UnicodeDecodeError as error:
        raise InvalidMessage("the file is not UTF-8 text", where=file, fix="Save it as UTF-8.") from error
    except OSError as error:
        raise Denied(f"cannot read the file: {error.strerror}", where=file) from error
    return parse(text, "standard input" if file == STDIN else file)


@command(app, "apply", "slmops blueprint apply edge-chat.yaml", "cat edge-chat.json | slmops blueprint apply -")
async def apply(
    session: Session,
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML or JSON; - reads standard input.")],
) -> None:
    """Store the file as the newest revision of a blueprint. Applying the same content again changes nothing."""
    spec = read(file)
    view = await (await session.client()).request(ApplyBlueprint(spec=spec))
    session.show(view, render.blueprints([view], utc_now()))


@command(app, "ls", "slmops blueprint ls", "slmops blueprint ls --json")
async def ls(session: Session) -> None:
    """List all blueprints with their newest revision and stable release."""
    answer = await (await session.client()).request(ListBlueprints())
    session.show(answer, render.blueprints(answer.blueprints, utc_now()))
