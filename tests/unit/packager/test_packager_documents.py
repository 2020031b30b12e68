"""The bill of materials and the provenance of a package conform to the official formats and match its files."""

from __future__ import annotations

import json
from datetime import timedelta, timezone
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from unit.packager.packager_examples import CONTENT, T0, variant

from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.manifest import DOC
from slmops.contracts.model import ModelFile
from slmops.packager.evidence import Evidence, licence_name
from slmops.packager.modelpack import BOM_PATH, PROVENANCE_PATH, build

WEIGHTS, LICENCE = digest_of(b"weights"), digest_of(b"licence")
REPORT: dict[str, Any] = {
    "recipe": {"name": "int4", "passes": [{"name": "quantize", "params": {"bits": 4}}]},
    "reference_files": [
        {"path": "model.safetensors", "digest": WEIGHTS, "size_bytes": 7},
        {"path": "LICENSE", "digest": LICENCE, "size_bytes": 7},
    ],
    "evaluation_text": {"name": "evaluation.txt", "digest": digest_of(b"evaluation")},
    "calibration_text": {"name": "calibration.txt", "digest": digest_of(b"calibration")},
    "tasks": [{"name": "arithmetic", "digest": digest_of(b"arithmetic")}],
    "seed": 7,
    "tools": {"onnxruntime": "1.32.0", "torch": "2.13.0"},
    "windows": 12,
}
EVIDENCE = Evidence.decode(json.dumps(REPORT).encode()).model_copy(update={"licence": "apache-2.0"})
EVALUATED = Evaluation(bytes=5, kl=0.25, kl_low=0.2, kl_high=0.3, ppl=float("nan"), tasks={"arithmetic": 0.5})


def documents(evidence: Evidence = EVIDENCE, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the bill of materials and the provenance."""
    pack = build(variant(evaluation=EVALUATED, **changes), evidence)
    return json.loads(pack.documents[BOM_PATH]), json.loads(pack.documents[PROVENANCE_PATH])


def schema_error(bom: dict[str, Any]) -> object:
    """What the official schema has against it; None: nothing."""
    from cyclonedx.schema import SchemaVersion  # here, because importing the validator takes two seconds
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom))


@pytest.mark.parametrize("evidence", [EVIDENCE, Evidence(), EVIDENCE.model_copy(update={"licence": "gemma"})])
def test_the_bill_of_materials_is_valid_cyclonedx(evidence: Evidence) -> None:
    bom, _ = documents(evidence)
    assert schema_error(bom) is None


def test_the_validator_rejects_an_invalid_bill() -> None:
    bom, _ = documents()
    bom["metadata"]["component"]["type"] = "neural-network"
    assert schema_error(bom) is not None


def test_the_bill_lists_every_other_file_with_its_digest() -> None:
    pack = build(variant(), EVIDENCE)
    bom = json.loads(pack.documents[BOM_PATH])
    listed = {part["name"]: part["hashes"][0]["content"] for part in bom["components"] if part["type"] == "file"}
    layers = {path: layer.digest.removeprefix("sha256:") for path, layer in pack.files.items() if path != BOM_PATH}
    assert listed == layers
    assert set(bom["dependencies"][0]["dependsOn"]) == {f"file:{path}" for path in layers}


def test_the_model_has_its_origin_licence_figures_and_tools() -> None:
    bom, _ = documents()
    model = bom["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "smollm2", "1.0.0")
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    ancestor = {part["name"]: part["hashes"][0]["content"] for part in model["pedigree"]["ancestors"][0]["components"]}
    assert ancestor["model.safetensors"] == WEIGHTS.removeprefix("sha256:")
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "accuracy", "value": "0.5", "slice": "arithmetic"} in metrics
    assert metrics[0]["confidenceInterval"] == {"lowerBound": "0.2", "upperBound": "0.3"}
    assert [tool["purl"] for tool in bom["metadata"]["tools"]["components"]] == [
        "pkg:pypi/onnxruntime@1.32.0",
        "pkg:pypi/torch@2.13.0",
    ]


@pytest.mark.parametrize("evidence", [EVIDENCE, Evidence()])
def test_the_provenance_is_a_slsa_statement(evidence: Evidence) -> None:
    _, statement = documents(evidence)
    message = ParseDict(statement, StatementMessage())
    Statement.copy_from_pb(message).validate()
    ParseDict(statement["predicate"], Provenance())  # rejects fields that SLSA does not define
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"


def test_the_provenance_names_the_inputs_and_the_outputs() -> None:
    _, statement = documents()
    out = {resource["name"]: resource["digest"]["sha256"] for resource in statement["subject"]}
    assert out == {path: digest_of(data).removeprefix("sha256:") for path, data in CONTENT.items()}
    definition = statement["predicate"]["buildDefinition"]
    into = {
        resource["name"]: "sha256:" + resource["digest"]["sha256"] for resource in definition["resolvedDependencies"]
    }
    assert into["source/model.safetensors"] == WEIGHTS
    assert into["calibration: calibration.txt"] == digest_of(b"calibration")
    assert into["golden.jsonl"] == variant().golden.digest  # type: ignore[union-attr]
    assert definition["internalParameters"] == {"recipe": REPORT["recipe"], "seed": 7}
    run = statement["predicate"]["runDetails"]
    assert run["builder"]["version"] == REPORT["tools"]
    assert run["metadata"] == {"invocationId": variant().job, "finishedOn": "2030-01-01T00:00:00Z"}


def test_documents_depend_only_on_the_variant() -> None:
    there = T0.astimezone(timezone(timedelta(hours=5)))
    assert documents() == documents(at=there)
    assert documents() != documents(at=T0 + timedelta(seconds=1))


def test_the_licence_is_a_layer() -> None:
    layer = build(variant(), EVIDENCE).files["LICENSE"]
    assert (layer.digest, layer.media_type) == (LICENCE, DOC)
    own = build(variant(CONTENT | {"LICENSE": b"own"}), EVIDENCE)
    assert own.files["LICENSE"].digest == digest_of(b"own")


def test_a_licence_whose_path_conflicts_with_the_variant_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="folder"):
        build(variant(CONTENT | {"LICENSE/x": b"own"}), EVIDENCE)


@pytest.mark.parametrize("path", ["LICENSE", "NOTICE", "LICENSE.txt", "base/COPYING.md"])
def test_licences_are_found_by_name(path: str) -> None:
    file = ModelFile(path=path, digest=LICENCE, size_bytes=1)
    other = ModelFile(path="config.json", digest=WEIGHTS, size_bytes=1)
    assert Evidence(reference_files=(other, file)).licences == (file,)


@pytest.mark.parametrize("report", [b"", b"[]", b"{", b'{"tools": 1}', b'{"reference_files": [{"path": "../x"}]}'])
def test_a_report_that_cannot_be_read_is_refused(report: bytes) -> None:
    with pytest.raises(InvalidMessage, match="evaluation report"):
        Evidence.decode(report)


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("# Model\nlicense: mit\n", None),
        ("---\ntags: []\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_name_is_read_from_the_front_matter(card: str, name: str | None) -> None:
    assert licence_name(card) == name
