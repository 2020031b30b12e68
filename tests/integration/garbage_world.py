"""A registry that collects garbage in a bucket of its own, and the other services' objects in it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from integration.artifact_world import Operator, Optimizer, running, settings_of
from integration.kit_world import World

from slmops.contracts.commands import CollectGarbage, GarbageReport
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.events import PackagePublished, VariantOptimized
from slmops.contracts.manifest import JOB_REPORT, MODEL_CONFIG, OCI_MANIFEST, SIGNATURE, Manifest
from slmops.kit.clock import utc_now
from slmops.kit.objects.store import Objects
from slmops.kit.settings import ObjectSettings
from slmops.registry.app import build
from slmops.registry.settings import Settings

if TYPE_CHECKING:
    from servers import S3

GRACE = timedelta(seconds=1)
OLD_S = 3.1


def registry_settings(world: World, s3: S3, folder: Path) -> Settings:
    """Returns the settings of a registry with a bucket of its own, whose garbage may be young."""
    own = {"s3_bucket": f"registry-{uuid4().hex}", "shortest_grace": GRACE}
    return Settings.model_validate(settings_of(world, s3, "registry", folder) | own)


@asynccontextmanager
async def running_site(world: World, settings: Settings) -> AsyncIterator[Site]:
    async with running(build(settings)):
        objects = Objects(ObjectSettings.model_validate(settings.model_dump()))
        yield Site(world, objects, Operator(await world.connect("console")))


@dataclass
class Site:
    """A running registry with a bucket of its own, and helpers that store the other services' objects in it."""

    world: World
    objects: Objects
    operator: Operator

    async def collect(self, **how: Any) -> GarbageReport:
        return await self.operator.client.request(CollectGarbage(**({"grace": GRACE} | how)))

    async def variant(self, version: str, data: bytes) -> VariantOptimized:
        """Stores and announces a variant with its job report and a picture."""
        picture = await self.objects.put_bytes(b"picture " + data, "image/png")
        content = json.dumps({"pictures": [picture.model_dump(mode="json", by_alias=True)], "of": version})
        report = await self.objects.put_bytes(content.encode(), JOB_REPORT)
        optimizer = Optimizer(self.world, self.objects)
        made = await optimizer.variant({"model.onnx": data}, version=version, job_report=report)
        await optimizer.announce(made)
        return made

    async def package(self, variant: VariantOptimized) -> PackagePublished:
        config = await self.objects.put_bytes(f"config {variant.digest}".encode(), MODEL_CONFIG)
        layers = tuple(Descriptor(media_type="x/y", digest=f.digest, size=f.size_bytes) for f in variant.files)
        manifest = Manifest(config=config, layers=layers)
        package = PackagePublished(
            **variant.model_dump(include={"model", "version", "profile", "recipe"}),
            variant=variant.digest,
            manifest=await self.objects.put_bytes(manifest.encode(), OCI_MANIFEST),
            signature=await self.objects.put_bytes(f"signed {variant.digest}".encode(), SIGNATURE),
            size_bytes=1,
            at=utc_now(),
        )
        await self.world.publish(package)
        return package

    async def exist(self, *digests: Digest) -> list[bool]:
        return [await self.objects.exists(digest) for digest in digests]
