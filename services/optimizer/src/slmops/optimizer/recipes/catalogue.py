"""Describes the passes and their parameters for people and for other services."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from typing import Any

from slmops.contracts.commands import ParameterView, PassView, RecipeList
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.optimizer.passes import Pass, passes
from slmops.optimizer.recipes.library import bundled, check, shown


def catalogue() -> RecipeList:
    """Returns the bundled recipes with every parameter, and all passes with their parameters."""
    return RecipeList(
        recipes=tuple(map(_written_out, bundled().values())),
        passes=tuple(_pass(name, found) for name, found in passes().items()),
    )


def _written_out(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"passes": tuple(map(PassSpec.model_validate, shown(check(recipe))))})


def _pass(name: str, found: Pass) -> PassView:
    schema = found.params.model_json_schema()
    required = schema.get("required", ())
    return PassView(
        name=name,
        description=" ".join((sys.modules[found.run.__module__].__doc__ or "").split("\n\n")[0].split()),
        takes=found.takes,
        gives=found.gives,
        parameters=tuple(
            ParameterView(
                name=parameter,
                kind=kind_of(field),
                default=field.get("default"),
                required=parameter in required,
                description=inspect.cleandoc(field.get("description", "")),
            )
            for parameter, field in schema.get("properties", {}).items()
        ),
    )


def kind_of(schema: dict[str, Any]) -> str:
    """Describes a JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(kind_of(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(map(_word, schema["enum"]))
    if "const" in schema:
        return _word(schema["const"])
    match schema.get("type"):
        case "array":
            return f"list of {kind_of(schema.get('items', {}))}"
        case "object":
            return f"map of {kind_of(schema.get('additionalProperties', {}))}"
        case other:
            return " ".join([str(other or "anything"), *_limits(schema)])


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _limits(schema: dict[str, Any]) -> Iterator[str]:
    for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")):
        if key in schema:
            yield f"{sign} {schema[key]:g}"
