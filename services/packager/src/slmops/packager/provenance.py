"""Writes the provenance of a variant: an in-toto Statement with a SLSA v1 provenance predicate over its files. Pure.

It repeats what the optimizer's report says, and the package's signature covers it. Formats:
https://slsa.dev/spec/v1.0/provenance and https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
"""

from __future__ import annotations

import json
from datetime import UTC
from typing import Any

from slmops.contracts.descriptor import Digest
from slmops.contracts.events import VariantOptimized
from slmops.packager.evidence import Evidence

BUILD_TYPE = "urn:slmops:optimize:v1"
BUILDER = "urn:slmops:optimizer"


def provenance(variant: VariantOptimized, evidence: Evidence) -> bytes:
    """Returns the statement as JSON; the same variant always gives the same bytes."""
    files = sorted(variant.files, key=lambda file: file.path)
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [_resource(file.path, file.digest) for file in files],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {"buildDefinition": _definition(variant, evidence), "runDetails": _run(variant, evidence)},
    }
    return json.dumps(statement, sort_keys=True, indent=1, ensure_ascii=False).encode()


def _definition(variant: VariantOptimized, evidence: Evidence) -> dict[str, Any]:
    asked = {"model": variant.model, "version": variant.version, "profile": variant.profile, "recipe": variant.recipe}
    source = [_resource(f"source/{file.path}", file.digest) for file in evidence.reference_files]
    texts = [_resource(f"{use}: {text.name}", text.digest) for use, text in evidence.texts.items()]
    golden = [_resource("golden.jsonl", variant.golden.digest)] if variant.golden else []
    internal = {"recipe": evidence.recipe} | ({"seed": evidence.seed} if evidence.seed is not None else {})
    return {
        "buildType": BUILD_TYPE,
        "externalParameters": asked,
        "internalParameters": internal if evidence.recipe else {},
        "resolvedDependencies": sorted([*source, *texts, *golden], key=lambda resource: str(resource["name"])),
    }


def _run(variant: VariantOptimized, evidence: Evidence) -> dict[str, Any]:
    return {
        "builder": {"id": BUILDER, "version": evidence.tools},
        "metadata": {"invocationId": variant.job, "finishedOn": variant.at.astimezone(UTC).strftime("%FT%TZ")},
        "byproducts": [_resource("evaluation.json", variant.report.digest)],
    }


def _resource(name: str, digest: Digest) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}}
