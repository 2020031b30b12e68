"""Writes the bill of materials of a package: CycloneDX 1.6 with an ML model as its subject. Pure.

The document is built by hand because `cyclonedx-python-lib` has no model card. A test validates it against the official
schema.
Format: https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC
from typing import Any
from uuid import UUID, uuid5

from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.events import VariantOptimized
from slmops.packager.evidence import Evidence, spdx_id

_NAMESPACE = UUID("5f0c7c39-52a3-4fd4-a1b4-0d9a5c0f7e61")  # of our serial numbers, which are derived from the content
_METRICS = {
    "kl": "KL divergence from full precision, nats per token",
    "top1": "same most likely token as full precision, share",
    "ppl": "perplexity",
    "tokens_per_s": "tokens per second",
    "ttft_s": "time to first token, seconds",
    "peak_rss_bytes": "peak resident memory, bytes",
}


def bill_of_materials(variant: VariantOptimized, evidence: Evidence, layers: Mapping[str, Descriptor]) -> bytes:
    """Returns the bill of materials; the same variant always gives the same bytes.

    `layers` maps paths to all layers of the package except the bill itself.
    """
    files = [_file(f"file:{path}", path, layers[path].digest) for path in sorted(layers)]
    texts = [_data(use, text.name, text.digest) for use, text in evidence.texts.items()]
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": variant.at.astimezone(UTC).isoformat(),
            "tools": {"components": _tools(evidence.tools)},
            "component": _model(variant, evidence),
        },
        "components": [*files, *texts],
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in files]}],
    }
    document["serialNumber"] = f"urn:uuid:{uuid5(_NAMESPACE, _dump(document).decode())}"
    return _dump(document)


def _dump(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False).encode()


def _model(variant: VariantOptimized, evidence: Evidence) -> dict[str, Any]:
    made = {"recipe": variant.recipe, "profile": variant.profile, "variant": variant.digest, "job": variant.job}
    found: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": variant.model,
        "version": variant.version,
        "description": f"{variant.recipe} variant for {variant.profile}",
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "datasets": [{"ref": f"data:{use}"} for use in evidence.texts],
            },
            "quantitativeAnalysis": {"performanceMetrics": list(_metrics(variant.evaluation))},
        },
        "properties": [{"name": f"io.slmops:{name}", "value": value} for name, value in made.items()],
    }
    if evidence.licence:
        known = spdx_id(evidence.licence)
        found["licenses"] = [{"license": {"id": known} if known else {"name": evidence.licence}}]
    if evidence.reference_files:
        found["pedigree"] = {"ancestors": [_ancestor(variant, evidence)]}
    return found


def _ancestor(variant: VariantOptimized, evidence: Evidence) -> dict[str, Any]:
    """Returns the model version as it was registered."""
    files = sorted(evidence.reference_files, key=lambda file: file.path)
    return {
        "type": "machine-learning-model",
        "bom-ref": "source",
        "name": variant.model,
        "version": variant.version,
        "components": [_file(f"source:{file.path}", file.path, file.digest) for file in files],
    }


def _metrics(evaluation: Evaluation) -> Iterable[dict[str, Any]]:
    for name, label in _METRICS.items():
        value = getattr(evaluation, name)
        if value is None:
            continue
        low, high = getattr(evaluation, f"{name}_low", None), getattr(evaluation, f"{name}_high", None)
        interval = {"confidenceInterval": {"lowerBound": f"{low}", "upperBound": f"{high}"}} if low is not None else {}
        yield {"type": label, "value": f"{value}", **interval}
    for task, accuracy in sorted(evaluation.tasks.items()):
        yield {"type": "accuracy", "value": f"{accuracy}", "slice": task}


def _file(ref: str, path: str, digest: Digest) -> dict[str, Any]:
    return {"type": "file", "bom-ref": ref, "name": path, "hashes": [_hash(digest)]}


def _data(use: str, name: str, digest: Digest) -> dict[str, Any]:
    return {"type": "data", "bom-ref": f"data:{use}", "name": name, "description": use, "hashes": [_hash(digest)]}


def _hash(digest: Digest) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}


def _tools(versions: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        {"type": "application", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
        for name, version in sorted(versions.items())
    ]
