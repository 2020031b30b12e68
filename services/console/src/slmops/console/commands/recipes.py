"""`slmops recipe`: bundled recipes, the passes of recipes, and recipe files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import BaseModel, ValidationError

from slmops.console.render import optimizer as render
from slmops.console.session import Session, command
from slmops.console.yaml_document import load
from slmops.contracts.commands import ListRecipes, PassView
from slmops.contracts.errors import Denied, InvalidRecipe, NotFound
from slmops.contracts.names import check_name
from slmops.contracts.recipe import Recipe

app = typer.Typer(
    name="recipe", help="Show the bundled recipes and the passes that recipes consist of.", no_args_is_help=True
)


class Recipes(BaseModel):
    recipes: tuple[Recipe, ...]


class Passes(BaseModel):
    passes: tuple[PassView, ...]


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe from YAML, or JSON as a subset of YAML. Raises `NotFound`, `Denied`, `InvalidRecipe`.

    Whether the passes exist and fit together is checked by the optimizer.
    """
    try:
        return Recipe.model_validate(load(path.read_text(encoding="utf-8")), extra="forbid")
    except FileNotFoundError as error:
        raise NotFound("there is no such file", where=str(path), fix="Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InvalidRecipe(f"this is neither YAML nor JSON: {what}", where=str(path)) from error
    except OSError as error:
        raise Denied(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors())
        raise InvalidRecipe(
            f"this is not a valid recipe: {wrong}", where=str(path), fix="See `slmops recipe show int4` for an example."
        ) from error


@command(app, "ls", "slmops recipe ls", "slmops recipe ls --json")
async def ls(session: Session) -> None:
    """List the bundled recipes."""
    answer = await (await session.client()).request(ListRecipes())
    session.show(Recipes(recipes=answer.recipes), render.recipes(answer.recipes))


@command(app, "show", "slmops recipe show int4", "slmops recipe show int4 --json")
async def show(
    session: Session, name: Annotated[str, typer.Argument(metavar="NAME", help="A bundled recipe.")]
) -> None:
    """Show a recipe with every parameter as YAML. Save it under another name to write a recipe of your own."""
    check_name(name, "recipe name")
    answer = await (await session.client()).request(ListRecipes())
    found = next((recipe for recipe in answer.recipes if recipe.name == name), None)
    if found is None:
        known = ", ".join(recipe.name for recipe in answer.recipes)
        raise NotFound(f"there is no recipe {name!r}", fix=f"Use one of: {known}.")
    if session.as_json:
        session.show(found, "")
    else:
        print(render.recipe(found))


@command(app, "passes", "slmops recipe passes", "slmops recipe passes --json")
async def passes(session: Session) -> None:
    """Show every pass with its parameters, their defaults and their meaning."""
    answer = await (await session.client()).request(ListRecipes())
    session.show(Passes(passes=answer.passes), render.passes(answer.passes))
