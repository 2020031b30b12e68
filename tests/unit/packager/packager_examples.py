"""An example variant, its package on disk, and keys for the tests of the packager and of the gateway's verification."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Descriptor, Digest, digest_of
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.events import VariantOptimized
from slmops.contracts.manifest import MANIFEST_PATH, OCI_MANIFEST, SIGNATURE, SIGNATURE_PATH, Manifest
from slmops.contracts.model import ModelFile, files_digest
from slmops.kit.oci_layout import layout_files
from slmops.packager.modelpack import EVALUATION_PATH, GOLDEN_PATH, build
from slmops.packager.sign import sign

T0 = datetime(2030, 1, 1, tzinfo=UTC)
CONTENT = {
    "model.onnx": b"graph" * 50,
    "model.onnx.data": bytes(range(256)) * 8,
    "genai_config.json": b"{}",
    "tokenizer/tokenizer.json": b'{"vocab": {}}',
    ".gitattributes": b"*.onnx filter=lfs\n",
}
QUESTIONS, REPORT = b'{"prompt": "hi", "expect": ["h"]}\n', b'{"kl": 0.25}'


def variant(content: dict[str, bytes] | None = None, **changes: Any) -> VariantOptimized:
    content = CONTENT if content is None else content
    files = tuple(ModelFile(path=p, digest=digest_of(data), size_bytes=len(data)) for p, data in content.items())
    made = VariantOptimized(
        job="smollm2-1.0.0-edge-small",
        model="smollm2",
        version="1.0.0",
        profile="edge-small",
        recipe="int4",
        digest=files_digest(files),
        files=files,
        evaluation=Evaluation(bytes=sum(map(len, content.values())), kl=0.25, top1=0.8),
        report=Descriptor.of(REPORT, "application/json"),
        golden=Descriptor.of(QUESTIONS, "application/jsonl"),
        chosen=True,
        reason="int4: smallest of 2 that pass",
        at=T0,
    )
    return made.model_copy(update=changes)


@dataclass(frozen=True)
class Keys:
    private: Path
    public: Path


def new_keys(folder: Path, curve: ec.EllipticCurve | None = None) -> Keys:
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(curve or ec.SECP256R1())
    keys = Keys(folder / "private.pem", folder / "public.pem")
    pem, pkcs8, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    keys.private.write_bytes(key.private_bytes(pem, pkcs8, plain))
    keys.public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return keys


def write_package(
    folder: Path, keys: Keys, files: dict[str, bytes] | None = None, questions: bytes = QUESTIONS
) -> Digest:
    """Writes a signed package as a gateway lays it out and returns the digest of its manifest."""
    files = CONTENT if files is None else files
    pack = build(variant(files, golden=Descriptor.of(questions, "application/jsonl")))
    content = files | {GOLDEN_PATH: questions, EVALUATION_PATH: REPORT} | pack.documents
    for path, data in (content | {MANIFEST_PATH: pack.manifest.encode()}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    signature = folder.with_name(folder.name + ".sig")
    sign(folder, keys.private, signature)
    signature.rename(folder / SIGNATURE_PATH)
    return digest_of(pack.manifest.encode())


def rewrite_manifest(folder: Path, manifest: Manifest) -> Digest:
    (folder / MANIFEST_PATH).write_bytes(manifest.encode())
    return digest_of(manifest.encode())


def write_layout(package: Path, layout: Path) -> Descriptor:
    """Writes the package in the folder `package` as an OCI layout and returns the descriptor of its manifest."""
    manifest = Descriptor.of((package / MANIFEST_PATH).read_bytes(), OCI_MANIFEST)
    files = [path.read_bytes() for path in package.rglob("*") if path.is_file()]
    blobs = {blob_key(digest_of(data)): data for data in [*files, build(variant()).config]}
    signature = Descriptor.of((package / SIGNATURE_PATH).read_bytes(), SIGNATURE)
    for path, data in (blobs | layout_files(manifest, "1.0.0", signature)).items():
        (layout / path).parent.mkdir(parents=True, exist_ok=True)
        (layout / path).write_bytes(data)
    return manifest
