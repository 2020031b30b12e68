"""Recipes are checked before they run."""

from __future__ import annotations

import pytest

from slmops.contracts.errors import InvalidRecipe, NotFound
from slmops.contracts.recipe import Recipe
from slmops.optimizer.recipes.library import bundled, check, read_recipe, recipe_named, shown


def recipe(*passes: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"name": "mine", "passes": passes})


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_recipe_is_valid(name):
    assert check(recipe_named(name))[-1].kind.gives == "variant"
    assert bundled()[name].description


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([{"pass": "quantise"}], "there is no pass 'quantise'"),
        ([{"pass": "quantize"}], "ends in a coded model"),
        ([{"pass": "pack"}], "pack takes a coded model"),
        ([{"pass": "quantize"}, {"pass": "prune-depth", "params": {"layers": 1}}], "prune-depth takes a float model"),
        ([{"pass": "quantize", "params": {"bits": 3}}, {"pass": "pack"}], "bits"),
        ([{"pass": "quantize", "params": {"bit": 4}}, {"pass": "pack"}], "bit: Extra inputs"),
        (
            [{"pass": "quantize", "params": {"bits": 8, "upgraded_share": 0.5}}, {"pass": "pack"}],
            "no effect with bits: 8",
        ),
    ],
)
def test_an_invalid_recipe_is_refused_and_the_pass_named(passes, message):
    with pytest.raises(InvalidRecipe, match=message) as caught:
        check(recipe(*passes))
    assert caught.value.where
    assert caught.value.where.startswith("recipe mine, pass ")


def test_equivalent_recipes_have_the_same_digest_whatever_their_names():
    one = recipe({"pass": "build"})
    assert one.digest == one.model_copy(update={"name": "yours", "description": "…"}).digest
    assert one.digest != recipe({"pass": "build", "params": {"precision": "int8"}}).digest


def test_a_recipe_is_read_from_yaml_and_a_broken_file_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("name: mine\npasses:\n  - pass: quantize\n    params: {bits: 8}\n  - pass: pack\n")
    assert shown(check(read_recipe(file)))[0]["params"]["bits"] == 8
    file.write_text("name: mine\npasses: []\n")
    with pytest.raises(InvalidRecipe, match="passes"):
        read_recipe(file)
    file.write_text("{")
    with pytest.raises(InvalidRecipe):
        read_recipe(file)


def test_the_error_about_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(NotFound, match="int3") as caught:
        recipe_named("int3")
    assert caught.value.fix
    assert "int4-calibrated" in caught.value.fix
