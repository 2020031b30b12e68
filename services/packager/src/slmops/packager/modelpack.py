"""Builds the CNCF ModelPack of a variant: an OCI manifest, its config, and the documents that we write. Pure.

The same event always makes the same bytes: the only time in them is the event's, and files are sorted by path.
Layers are raw files, so a blob of the object store is a layer without conversion.
Formats: https://github.com/modelpack/model-spec (docs/config.md, docs/spec.md) and the OCI image-spec v1.1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC
from pathlib import PurePosixPath

from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.events import VariantOptimized
from slmops.contracts.manifest import (
    DATASET,
    DOC,
    FILE_PATH,
    GOLDEN_PATH,
    MANIFEST_PATH,
    MODEL_CONFIG,
    SIGNATURE_PATH,
    TITLE,
    WEIGHT,
    WEIGHT_CONFIG,
    Manifest,
)
from slmops.contracts.model import collision
from slmops.contracts.prompts.prompt_format import PROMPT_FORMAT
from slmops.packager.bom import bill_of_materials
from slmops.packager.evidence import Evidence, is_licence
from slmops.packager.modelcard import model_card
from slmops.packager.provenance import provenance

CARD_PATH = "README.md"
CONFIG_PATH = "config.json"
"""The model's architecture in Hugging Face's format, which the optimizer adds to each variant."""
EVALUATION_PATH = "evaluation.json"
BOM_PATH = "bom.cdx.json"
PROVENANCE_PATH = "provenance.json"
_OURS = frozenset({MANIFEST_PATH, SIGNATURE_PATH, GOLDEN_PATH, EVALUATION_PATH, BOM_PATH, PROVENANCE_PATH})
_FORMATS = {".onnx": "onnx", ".gguf": "gguf", ".safetensors": "safetensors"}
_WEIGHTS = frozenset({*_FORMATS, ".data", ".onnx_data", ".onnx_adapter", ".bin"})
_DOCS = frozenset({".md", ".rst", ".pdf"})


@dataclass(frozen=True)
class ModelPack:
    """A package. `documents` are the layers that are written here, by path; other layers are blobs in the store."""

    manifest: Manifest
    config: bytes
    documents: dict[str, bytes]

    @property
    def files(self) -> dict[str, Descriptor]:
        """The layers by their path in the package."""
        return {layer.annotations[FILE_PATH]: layer for layer in self.manifest.layers}

    @property
    def size_bytes(self) -> int:
        return sum(layer.size for layer in self.manifest.layers)


def build(variant: VariantOptimized, evidence: Evidence | None = None) -> ModelPack:
    """Builds the package of a variant. Raises `InvalidMessage` when its files cannot be laid out in one folder."""
    evidence = evidence or Evidence()
    layers, documents = _stored(variant, evidence), _documents(variant, evidence)
    layers += [_layer(Descriptor.of(data, DOC), path) for path, data in documents.items()]
    bom = bill_of_materials(variant, evidence, {layer.annotations[FILE_PATH]: layer for layer in layers})
    layers.append(_layer(Descriptor.of(bom, DOC), BOM_PATH))
    config = _config(variant, evidence, layers)
    manifest = Manifest(
        config=Descriptor.of(config, MODEL_CONFIG), layers=tuple(layers), annotations=_annotations(variant, evidence)
    )
    return ModelPack(manifest, config, documents | {BOM_PATH: bom})


def _stored(variant: VariantOptimized, evidence: Evidence) -> list[Descriptor]:
    """Returns the layers that are already stored: the variant, the version's licence, golden prompts, the report."""
    paths = [file.path for file in variant.files]
    licences = [file for file in evidence.licences if file.path not in paths]
    _check_paths([*paths, *(file.path for file in licences)])
    layers = [
        _layer(Descriptor(media_type=_media_type(file.path), digest=file.digest, size=file.size_bytes), file.path)
        for file in (*sorted(variant.files, key=lambda file: file.path), *licences)
    ]
    if variant.golden:
        layers.append(_layer(variant.golden.model_copy(update={"media_type": DATASET}), GOLDEN_PATH))
    layers.append(_layer(variant.report.model_copy(update={"media_type": DOC}), EVALUATION_PATH))
    return layers


def _documents(variant: VariantOptimized, evidence: Evidence) -> dict[str, bytes]:
    """Returns the documents that we write, by path. A variant that has its own model card keeps it."""
    written = {PROVENANCE_PATH: provenance(variant, evidence)}
    if CARD_PATH.casefold() not in (file.path.casefold() for file in variant.files):
        written[CARD_PATH] = model_card(variant).encode()
    return written


def _layer(content: Descriptor, path: str) -> Descriptor:
    return Descriptor(
        media_type=content.media_type,
        digest=content.digest,
        size=content.size,
        annotations={FILE_PATH: path, TITLE: path},
    )


def _media_type(path: str) -> str:
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _WEIGHTS:
        return WEIGHT
    # All other files are configuration: tokenizer, vocabulary, chat template, generation settings.
    return DOC if suffix in _DOCS or is_licence(path) else WEIGHT_CONFIG


def _check_paths(paths: list[str]) -> None:
    for path in paths:
        if PurePosixPath(path).parts[0].casefold() in _OURS:
            raise InvalidMessage(
                f"the variant has a file {path}, which the package itself writes", fix="Rename the file."
            )
    if both := collision(paths):
        raise InvalidMessage(
            f"{both[0]} and {both[1]} of the variant cannot be in one folder everywhere: the same name, or a file and "
            "a folder",
            fix="Rename one.",
        )


def _config(variant: VariantOptimized, evidence: Evidence, layers: Iterable[Descriptor]) -> bytes:
    suffixes = {PurePosixPath(file.path).suffix.lower() for file in variant.files}
    described = {
        "createdAt": _created(variant),
        "name": variant.model,
        "version": variant.version,
        "title": f"{variant.model} {variant.version}",
        "description": _description(variant),
        "family": evidence.family,
        "licenses": [evidence.spdx] if evidence.spdx else None,
    }
    technical = {
        "architecture": "transformer",  # all models that the optimizer accepts are decoders of this kind
        "format": next((name for suffix, name in _FORMATS.items() if suffix in suffixes), None),
        "precision": evidence.precision,
        "quantization": variant.recipe,
        "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
    }
    document = {
        "descriptor": _known(described),
        "config": _known(technical),
        # Layers are not compressed, so the digest of a layer is the digest of its content.
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _known(fields: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _description(variant: VariantOptimized) -> str:
    return f"{variant.recipe} variant for {variant.profile}"


def _annotations(variant: VariantOptimized, evidence: Evidence) -> dict[str, str]:
    optional = {
        "io.slmops.anchored-on": evidence.anchored_on,
        "io.slmops.adapter-of": evidence.base,
        PROMPT_FORMAT: evidence.prompt_format,
        "org.opencontainers.image.licenses": evidence.spdx,
    }
    return {name: value for name, value in optional.items() if value} | {
        TITLE: variant.model,
        "org.opencontainers.image.version": variant.version,
        "org.opencontainers.image.created": _created(variant),
        "org.opencontainers.image.description": _description(variant),
        "io.slmops.profile": variant.profile,
        "io.slmops.recipe": variant.recipe,
        "io.slmops.variant": variant.digest,
        "io.slmops.job": variant.job,
    }


def _created(variant: VariantOptimized) -> str:
    return variant.at.astimezone(UTC).isoformat()
