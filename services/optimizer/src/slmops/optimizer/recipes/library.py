"""The bundled recipes, and the check of a recipe before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from slmops.contracts.errors import InvalidRecipe, NotFound
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.optimizer.passes import Form, Params, Pass, passes

_BUNDLED = files("slmops.optimizer") / "data" / "recipes.yaml"


class Step(NamedTuple):
    """One pass of a checked recipe."""

    name: str
    kind: Pass
    params: Params


class _Bundle(BaseModel):
    model_config = ConfigDict(frozen=True)

    recipes: tuple[Recipe, ...]


@cache
def bundled() -> Mapping[str, Recipe]:
    """Returns every bundled recipe by name, in the order of the file."""
    found = _Bundle.model_validate(yaml.safe_load(_BUNDLED.read_text(encoding="utf-8")))
    return {recipe.name: recipe for recipe in found.recipes}


def recipe_named(name: str) -> Recipe:
    """Returns a bundled recipe. Raises `NotFound`."""
    if name not in bundled():
        raise NotFound(f"there is no recipe {name!r}", fix="Use one of: " + ", ".join(bundled()) + ".")
    return bundled()[name]


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe from a YAML or JSON file. Raises `InvalidRecipe`."""
    try:
        recipe = Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")), extra="forbid")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise InvalidRecipe(
            f"this is not a recipe: {_first(error)}", where=str(path), fix="See an example: slmops recipe show int4."
        ) from error
    check(recipe)
    return recipe


def check(recipe: Recipe) -> list[Step]:
    """Returns the passes with all parameters, including defaults. Raises `InvalidRecipe`.

    A recipe starts from float weights and ends in a variant. Each pass must take the kind of model that the previous
    pass gives.
    """
    steps = [_step(recipe, number, spec) for number, spec in enumerate(recipe.passes, 1)]
    form: Form = "float"
    for number, step in enumerate(steps, 1):
        if step.kind.takes != form:
            raise _contradiction(
                recipe, number, f"{step.name} takes a {step.kind.takes} model, but the previous pass gives a {form} one"
            )
        form = step.kind.gives
    if form != "variant":
        raise _contradiction(recipe, len(steps), f"the recipe ends in a {form} model, which cannot run; add pack")
    return steps


def _step(recipe: Recipe, number: int, spec: PassSpec) -> Step:
    known = passes()
    if spec.pass_ not in known:
        raise _contradiction(recipe, number, f"there is no pass {spec.pass_!r}; known: {', '.join(known)}")
    kind = known[spec.pass_]
    try:
        return Step(spec.pass_, kind, kind.params.model_validate(spec.params))
    except ValidationError as error:
        raise _contradiction(recipe, number, f"{spec.pass_}: {_first(error)}") from error


def _contradiction(recipe: Recipe, number: int, what: str) -> InvalidRecipe:
    return InvalidRecipe(
        what, where=f"recipe {recipe.name}, pass {number}", fix="List passes and parameters: slmops recipe passes."
    )


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        found: Any = error.errors(include_input=False)[0]
        return f"{'.'.join(map(str, found['loc'])) or 'recipe'}: {found['msg']}"
    return str(error).splitlines()[0]


def shown(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Returns every pass with all its parameters, for people and for cache keys."""
    return [{"pass": step.name, "params": step.params.model_dump(mode="json")} for step in steps]
