"""Assembles the signed package of a variant: fetches the files, lays them out, signs them, stores the result.

Everything it stores is content-addressed: a packager that dies and starts over leaves at most an unreferenced blob.
Every file is read back and verified before it is signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import DigestMismatch
from slmops.contracts.events import VariantOptimized
from slmops.contracts.manifest import DOC, MANIFEST_PATH, MODEL_CONFIG, OCI_MANIFEST, SIGNATURE
from slmops.contracts.model import ModelFile
from slmops.kit.objects.store import Objects
from slmops.kit.tracing import span
from slmops.packager.evidence import Evidence, family_of, licence_name
from slmops.packager.modelpack import CONFIG_PATH, ModelPack, build
from slmops.packager.sign import check_signing_key, sign
from slmops.packager.workspace import Workspace

_REPORT_LIMIT_BYTES = 4 << 20
_FACTS_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Assembled:
    """A package in the object store; `size_bytes` is the sum of its layers."""

    manifest: Descriptor
    signature: Descriptor
    size_bytes: int


class Assembler:
    """Assembles packages in the folder `work`, which nothing else may use: `open` empties it."""

    def __init__(self, objects: Objects, work: Path, signing_key: Path) -> None:
        self._objects = objects
        self._workspace = Workspace(work)
        self._signing_key = signing_key

    async def open(self) -> None:
        """Removes what a killed process left. Raises `InvalidMessage` for a key that cannot sign."""
        check_signing_key(self._signing_key)
        await self._workspace.clear()

    async def assemble(self, variant: VariantOptimized, base: Digest | None = None) -> Assembled:
        """Builds, signs and stores the package of a variant. `base` is the package that an adapter belongs to.

        Raises `NotFound`, `DigestMismatch`, `DiskFull`, `InvalidMessage`.
        """
        evidence = await self._evidence(variant)
        pack = build(variant, evidence.model_copy(update={"base": base}))
        async with self._workspace.folder() as workspace:
            # The directory's name is the signature's subject.
            directory, signature = workspace / f"{variant.model}-{variant.version}", workspace / "signature"
            with span("collect package", model=variant.model, version=variant.version, bytes=pack.size_bytes):
                await self._collect(pack, directory)
            with span("sign package", model=variant.model, version=variant.version):
                await self._workspace.run(lambda: sign(directory, self._signing_key, signature))
            return await self._put(pack, await self._workspace.run(signature.read_bytes))

    async def _evidence(self, variant: VariantOptimized) -> Evidence:
        evidence = Evidence.decode(await self._objects.get_bytes(variant.report.digest, _REPORT_LIMIT_BYTES))
        card = await self._small(evidence.card)
        config = await self._small(next((file for file in variant.files if file.path == CONFIG_PATH), None))
        licence = licence_name(card.decode(errors="replace")) if card else None
        return evidence.model_copy(update={"licence": licence, "family": family_of(config) if config else None})

    async def _small(self, file: ModelFile | None) -> bytes | None:
        """Returns the content of a file that only adds facts; None if there is none or it is too large for that."""
        if file is None or file.size_bytes > _FACTS_LIMIT_BYTES:
            return None
        return await self._objects.get_bytes(file.digest, _FACTS_LIMIT_BYTES)

    async def _collect(self, pack: ModelPack, directory: Path) -> None:
        """Writes the package into `directory` as a gateway will lay it out, without the signature."""
        present = await self._workspace.run(lambda: _write_documents(pack, directory))
        for path, layer in pack.files.items():
            if path not in present:
                await self._objects.get_file(layer.digest, directory / path)
        await self._workspace.run(lambda: _check_sizes(pack, directory))

    async def _put(self, pack: ModelPack, signature: bytes) -> Assembled:
        await self._objects.put_bytes(pack.config, MODEL_CONFIG)
        for document in pack.documents.values():
            await self._objects.put_bytes(document, DOC)
        signed = await self._objects.put_bytes(signature, SIGNATURE)
        manifest = await self._objects.put_bytes(pack.manifest.encode(), OCI_MANIFEST)
        return Assembled(manifest, signed, pack.size_bytes)


def _write_documents(pack: ModelPack, directory: Path) -> set[str]:
    """Writes the manifest and the documents. Returns the files of the package that are there already."""
    directory.mkdir(parents=True)
    (directory / MANIFEST_PATH).write_bytes(pack.manifest.encode())
    for path, document in pack.documents.items():
        (directory / path).write_bytes(document)
    return {path for path in pack.files if (directory / path).exists()}


def _check_sizes(pack: ModelPack, directory: Path) -> None:
    for path, layer in pack.files.items():
        size = (directory / path).stat().st_size
        if size != layer.size:
            raise DigestMismatch(f"{path} has {size} bytes instead of {layer.size}", where=layer.digest)
