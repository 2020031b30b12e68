"""`slmops recipe`: what the optimizer can do, and recipes of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import BaseModel, ValidationError

from slmops.console.render import optimizer as render
from slmops.console.session import Session, command
from slmops.contracts.commands import ListRecipes, PassView
from slmops.contracts.errors import Denied, InvalidRecipe, NotFound
from slmops.contracts.names import check_name
from slmops.contracts.recipe import Recipe

app = typer.Typer(name="recipe", help="Recipes and the passes that they are made of.", no_args_is_help=True)


class Recipes(BaseModel):
    recipes: tuple[Recipe, ...]


class Passes(BaseModel):
    passes: tuple[PassView, ...]


def read_recipe(path: Path) -> Recipe:
    """From YAML or JSON, which is YAML too. Raises `NotFound`, `Denied`, and `InvalidRecipe` with what is wrong.

    Whether its passes exist and go together is for the optimizer to say.
    """
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")), extra="forbid")
    except FileNotFoundError as error:
        raise NotFound("there is no such file", where=str(path), fix="Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InvalidRecipe(f"this is neither YAML nor JSON: {what}", where=str(path)) from error
    except OSError as error:
        raise Denied(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors())
        raise InvalidRecipe(
            f"this is not a recipe: {wrong}", where=str(path), fix="See `slmops recipe show int4` for one."
        ) from error


@command(app, "ls", "slmops recipe ls", "slmops recipe ls --json")
async def ls(session: Session) -> None:
    """The bundled recipes."""
    answer = await (await session.client()).request(ListRecipes())
    session.show(Recipes(recipes=answer.recipes), render.recipes(answer.recipes))


@command(app, "show", "slmops recipe show int4", "slmops recipe show int4 --json")
async def show(
    session: Session, name: Annotated[str, typer.Argument(metavar="NAME", help="A bundled recipe.")]
) -> None:
    """One recipe with every parameter, as YAML: change its name and it is a recipe of your own."""
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
    """Every pass with its parameters, their defaults and what they mean."""
    answer = await (await session.client()).request(ListRecipes())
    session.show(Passes(passes=answer.passes), render.passes(answer.passes))
