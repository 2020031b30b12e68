"""The manifest depends only on the variant and conforms to the ModelPack specification."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta, timezone

import pytest
from unit.packager.packager_examples import CONTENT, QUESTIONS, REPORT, T0, variant

from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.manifest import DATASET, DOC, MODEL_CONFIG, MODEL_MANIFEST, WEIGHT, WEIGHT_CONFIG, Manifest
from slmops.contracts.prompts.prompt_format import PROMPT_FORMAT, PromptFormat, prompt_format
from slmops.packager.evidence import Evidence, family_of
from slmops.packager.modelcard import model_card
from slmops.packager.modelpack import CARD_PATH, build

_BUILD = """
import sys
from slmops.contracts.descriptor import digest_of
from slmops.contracts.events import VariantOptimized
from slmops.packager.modelpack import build
print(digest_of(build(VariantOptimized.model_validate_json(sys.stdin.read())).manifest.encode()))
"""


def test_the_same_variant_gives_the_same_manifest_in_another_process() -> None:
    here = digest_of(build(variant()).manifest.encode())
    for seed in ("0", "1"):  # of string hashes, which determine the order of sets
        there = subprocess.run(
            [sys.executable, "-c", _BUILD],
            input=variant().model_dump_json(),
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        )
        assert there.stdout.strip() == here


def test_neither_the_order_of_files_nor_the_time_zone_matters() -> None:
    backward = variant(dict(reversed(CONTENT.items())), at=T0.astimezone(timezone(timedelta(hours=5))))
    assert build(backward) == build(variant())


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "int8"},
        {"version": "1.0.1"},
        {"at": T0 + timedelta(seconds=1)},
        {"golden": None},
        {"report": Descriptor.of(b"other", "application/json")},
    ],
)
def test_another_variant_gives_another_manifest(change: dict[str, object]) -> None:
    assert build(variant(**change)).manifest.encode() != build(variant()).manifest.encode()


def test_every_file_is_a_layer_with_the_right_media_type() -> None:
    pack = build(variant())
    kinds = {path: layer.media_type for path, layer in pack.files.items()}
    assert kinds == {
        "model.onnx": WEIGHT,
        "model.onnx.data": WEIGHT,
        "genai_config.json": WEIGHT_CONFIG,
        "tokenizer/tokenizer.json": WEIGHT_CONFIG,
        ".gitattributes": WEIGHT_CONFIG,
        "golden.jsonl": DATASET,
        "evaluation.json": DOC,
        "provenance.json": DOC,
        "README.md": DOC,
        "bom.cdx.json": DOC,
    }
    content = CONTENT | {"golden.jsonl": QUESTIONS, "evaluation.json": REPORT} | pack.documents
    assert {path: (layer.digest, layer.size) for path, layer in pack.files.items()} == {
        path: (digest_of(data), len(data)) for path, data in content.items()
    }
    assert pack.size_bytes == sum(map(len, content.values()))


def test_the_manifest_is_an_oci_manifest_of_a_model() -> None:
    raw = json.loads(build(variant()).manifest.encode())
    assert (raw["schemaVersion"], raw["artifactType"]) == (2, MODEL_MANIFEST)
    assert raw["annotations"]["org.opencontainers.image.version"] == "1.0.0"
    assert raw["annotations"]["org.opencontainers.image.created"] == "2030-01-01T00:00:00+00:00"
    assert raw["annotations"]["io.slmops.recipe"] == "int4"
    for layer in raw["layers"]:  # oras writes a layer under its title
        named = layer["annotations"]
        assert named["org.opencontainers.image.title"] == named["org.cncf.model.filepath"]
    assert Manifest.decode(json.dumps(raw).encode()) == build(variant()).manifest


def test_the_manifest_names_the_format_of_prompts_that_the_report_names() -> None:
    evidence = Evidence.decode(b'{"prompt_format": "text"}')
    assert prompt_format(build(variant(), evidence).manifest.annotations) is PromptFormat.TEXT
    before = build(variant(), Evidence.decode(b"{}")).manifest.annotations
    assert PROMPT_FORMAT not in before
    assert prompt_format(before) is PromptFormat.CHAT


def test_the_config_describes_the_model_and_its_layers() -> None:
    pack = build(variant())
    config = json.loads(pack.config)
    assert pack.manifest.config == Descriptor.of(pack.config, MODEL_CONFIG)
    assert config["descriptor"] == {
        "name": "smollm2",
        "version": "1.0.0",
        "title": "smollm2 1.0.0",
        "description": "int4 variant for edge-small",
        "createdAt": "2030-01-01T00:00:00+00:00",
    }
    assert config["config"] == {
        "architecture": "transformer",
        "format": "onnx",
        "quantization": "int4",
        "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
    }
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer.digest for layer in pack.manifest.layers]}


def recipe(*passes: dict[str, object]) -> dict[str, object]:
    return {"name": "mine", "passes": list(passes)}


@pytest.mark.parametrize(
    ("passes", "precision"),
    [
        ([{"pass": "quantize", "params": {"bits": 8}}, {"pass": "pack"}], "int8"),
        ([{"pass": "quantize", "params": {"bits": 4, "upgraded_share": 0.17}}, {"pass": "pack"}], "mixed"),
        ([{"pass": "build", "params": {"precision": "int4"}}], "int4"),
        ([{"pass": "build", "params": {"options": {"matmul_mixed_precision": "x"}}}], "mixed"),
        ([{"pass": "pack"}], None),
    ],
)
def test_the_config_names_architecture_precision_and_licence(passes: list[dict[str, object]], precision: str) -> None:
    evidence = Evidence(recipe=recipe(*passes), licence="apache-2.0", family="llama")
    pack = build(variant(), evidence)
    config = json.loads(pack.config)
    assert config["config"].get("precision") == precision
    assert (config["descriptor"]["family"], config["descriptor"]["licenses"]) == ("llama", ["Apache-2.0"])
    assert pack.manifest.annotations["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_a_licence_unknown_to_spdx_is_a_reference() -> None:
    config = json.loads(build(variant(), Evidence(licence="llama3.2")).config)
    assert config["descriptor"]["licenses"] == ["LicenseRef-llama3.2"]


@pytest.mark.parametrize(
    ("config", "family"),
    [(b'{"model_type": "llama"}', "llama"), (b"[]", None), (b"{", None), (b'{"model_type": "a b"}', None)],
)
def test_the_family_is_the_model_type(config: bytes, family: str | None) -> None:
    assert family_of(config) == family


def test_a_variant_with_its_own_model_card_keeps_it() -> None:
    pack = build(variant(CONTENT | {CARD_PATH: b"# mine"}))
    assert CARD_PATH not in pack.documents
    assert pack.files[CARD_PATH].digest == digest_of(b"# mine")


@pytest.mark.parametrize(
    "path",
    [
        "manifest.json",
        "model.sig",
        "golden.jsonl",
        "evaluation.json",
        "bom.cdx.json",
        "provenance.json",
        "model.sig/x",
        "Model.Sig",
    ],
)
def test_a_variant_cannot_contain_a_file_that_the_package_writes(path: str) -> None:
    with pytest.raises(InvalidMessage, match=path):
        build(variant(CONTENT | {path: b"x"}))


def test_files_with_conflicting_paths_are_refused() -> None:
    with pytest.raises(InvalidMessage, match="folder"):
        build(variant({"a": b"1", "a/b": b"2"}))
    with pytest.raises(InvalidMessage, match="same name"):
        build(variant({"a": b"1", "A": b"2"}))
    twice = variant()
    with pytest.raises(InvalidMessage):
        build(twice.model_copy(update={"files": (*twice.files, twice.files[0])}))


def test_the_model_card_shows_missing_figures_as_not_measured() -> None:
    card = model_card(variant(evaluation=Evaluation(bytes=5, kl=0.25)))
    assert "| KL divergence from full precision, nats per token | 0.25 |" in card
    assert "| Perplexity | not measured |" in card
    assert "int4: smallest of 2 that pass" in card
