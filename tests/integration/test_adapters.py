"""A LoRA adapter of one site, from its push to an answer: kilobytes on a base that the gateway already has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from integration.artifact_world import published, release
from integration.gateway_site import site_on
from integration.optimizer_world import factory_on
from tiny_model import make_tiny_llama
from unit.optimizer.test_optimizer_intake_adapter import make_adapter

from slmops.console.commands.push import push
from slmops.contracts.events import PackagePublished, VariantOptimized
from slmops.contracts.jobs import JobState
from slmops.contracts.manifest import ADAPTER_PATH, Manifest, layers_by_path
from slmops.gateway.serving.generation import Generation, LoadedModel
from slmops.gateway.serving.inference import InferenceRequest

if TYPE_CHECKING:
    from integration.gateway_site import Site
    from integration.optimizer_world import Factory
    from servers import S3, NatsServer

RECIPE = "int4-adaptable"
QUESTION = InferenceRequest(prompt="What is a washer for?", max_tokens=24)


@pytest.mark.timeout(400)
async def test_a_gateway_with_the_base_fetches_only_the_adapter_and_answers_with_it(
    nats_server: NatsServer, s3: S3, tmp_path: Path
) -> None:
    base = make_tiny_llama(tmp_path / "llama-210", 210)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"], lora_alpha=32)
    async with site_on(nats_server, s3, tmp_path) as site, factory_on(site.rollout.world, s3, tmp_path) as factory:
        await factory.start("one", recipes=f'["{RECIPE}"]')
        first = await package(factory, "1.0.0", base)
        second = await package(factory, "1.0.0-site-a", adapter)
        manifest = await manifest_of(site, second)
        assert manifest.annotations["io.slmops.adapter-of"] == first.manifest.digest

        base_slot = await site.install(release(first))
        base_answer = answer(base_slot.path)
        site.slots.activate()
        site.slots.commit()
        slot = await site.install(release(second))
        installed = {one.digest for one in layers_by_path(await manifest_of(site, first)).values()}
        fetched = {path: one.size for path, one in layers_by_path(manifest).items() if one.digest not in installed}
        assert fetched.keys() == {ADAPTER_PATH, "README.md", "bom.cdx.json", "evaluation.json", "provenance.json"}
        assert site.acquirer.fetched_bytes == sum(fetched.values())
        assert answer(slot.path) != base_answer
        (slot.path / ADAPTER_PATH).unlink()
        assert answer(slot.path) == base_answer


async def manifest_of(site: Site, package: PackagePublished) -> Manifest:
    return Manifest.decode(await site.optimizer.objects.get_bytes(package.manifest.digest))


async def package(factory: Factory, version: str, source: Path) -> PackagePublished:
    count = len(await published(factory.world, 0))
    await push(factory.world.client, source, "tiny", version)
    job = await factory.reached((await factory.job_of(version)).job, JobState.DONE)
    [chosen] = [event for event in await factory.events(VariantOptimized, job.job) if event.chosen]
    assert chosen.recipe == RECIPE, job.reason
    return (await published(factory.world, count + 1))[-1]


def answer(folder: Path) -> str:
    generation = Generation(LoadedModel(folder, context_tokens=256), QUESTION, 0.0)
    while not (done := generation.done()):
        generation.step()
    return done.text
