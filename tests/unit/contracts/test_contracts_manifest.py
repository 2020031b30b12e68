"""Hostile manifests: rejected with a typed error, or naming only files inside their folder."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import InvalidMessage, SlmopsError
from slmops.contracts.manifest import FILE_PATH, MODEL_CONFIG, WEIGHT, Manifest, layers_by_path

CORPUS = Path(__file__).parents[2] / "corpus" / "manifest"
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def manifest(*paths: str) -> Manifest:
    layers = tuple(
        Descriptor.of(str(number).encode(), WEIGHT).model_copy(update={"annotations": {FILE_PATH: path}})
        for number, path in enumerate(paths)
    )
    return Manifest(config=Descriptor.of(b"{}", MODEL_CONFIG), layers=layers)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_what_a_fuzzer_found_stays_refused(path: Path) -> None:
    with pytest.raises(SlmopsError):
        layers_by_path(Manifest.decode(path.read_bytes()))


@given(st.binary(max_size=200))
def test_bytes_that_are_not_a_manifest_are_rejected(data: bytes) -> None:
    with pytest.raises(InvalidMessage):
        Manifest.decode(data)


@given(st.sampled_from(["config", "layers", "annotations", "schemaVersion", "artifactType"]), _JSON)
def test_a_field_of_another_type_is_rejected_or_harmless(field: str, value: object) -> None:
    document = json.loads(manifest("model.onnx").encode())
    document[field] = value
    try:
        found = Manifest.decode(json.dumps(document).encode())
    except InvalidMessage:
        return
    assert Manifest.decode(found.encode()) == found


@given(st.lists(st.text(max_size=12), min_size=1, max_size=3))
@example(["0/"])
@example(["a//b", "./c"])
def test_no_path_of_a_layer_leaves_the_package(paths: list[str]) -> None:
    try:
        found = layers_by_path(manifest(*paths))
    except InvalidMessage:
        return
    assert list(found) == [str(PurePosixPath(path)) for path in paths], "each once, in its one spelling"
    for path in map(PurePosixPath, found):
        assert path.parts
        assert not path.is_absolute()
        assert ".." not in path.parts


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "", "manifest.json", "model.sig", "a\\b", "a\0b"])
def test_a_path_outside_the_package_or_a_duplicate_path_is_rejected(path: str) -> None:
    with pytest.raises(InvalidMessage):
        layers_by_path(manifest("model.onnx", path))
    with pytest.raises(InvalidMessage):
        layers_by_path(manifest(path, path))
