"""YAML that a person may read differently than PyYAML is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from slmops.console.commands.blueprints import parse
from slmops.console.commands.recipes import read_recipe
from slmops.console.yaml_document import load
from slmops.contracts.errors import InvalidMessage, InvalidRecipe


def test_a_blueprint_with_a_key_twice_is_refused_with_its_line() -> None:
    with pytest.raises(InvalidMessage, match="the key 'model' occurs twice") as caught:
        parse("name: edge-chat\nmodel: smollm2\nmodel: other\n", "edge.yaml")
    assert caught.value.where == "edge.yaml line 3"


def test_a_recipe_with_a_parameter_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\npasses:\n  - {pass: quantize, params: {bits: 4, bits: 8}}\n  - {pass: pack}\n")
    with pytest.raises(InvalidRecipe, match="the key 'bits' occurs twice"):
        read_recipe(file)


def test_the_same_key_in_two_mappings_and_merged_keys_are_accepted() -> None:
    assert load("a: {x: 1}\nb: {x: 2}") == {"a": {"x": 1}, "b": {"x": 2}}
    assert load("a: &a {x: 1}\nb: {<<: *a, x: 2}") == {"a": {"x": 1}, "b": {"x": 2}}


def test_deep_nesting_is_an_error_of_the_document() -> None:
    with pytest.raises(yaml.YAMLError, match="nested too deeply"):
        load("[" * 100_000)
    with pytest.raises(InvalidMessage, match="nested too deeply"):
        parse("[" * 100_000, "edge.yaml")
