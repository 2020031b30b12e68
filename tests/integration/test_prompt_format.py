"""The optimizer and the gateway's probe use the same prompt format for a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import make_tiny
from tiny_tokenizers import BOS, EOS, PAD, TEMPLATE, llama3, save_tokenizer

from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.manifest import GOLDEN_PATH, MANIFEST_PATH, MODEL_CONFIG, OCI_MANIFEST, Manifest
from slmops.contracts.prompts.golden import GoldenPrompt, dump_golden
from slmops.contracts.prompts.prompt_format import PROMPT_FORMAT, PromptFormat
from slmops.gateway.install.golden import read_golden
from slmops.gateway.install.probe import ProbeBudget, probe
from slmops.gateway.serving.inference import Release
from slmops.gateway.serving.runner import ProcessRunner
from slmops.optimizer.measure.genai import GenaiModel
from slmops.optimizer.measure.golden import golden_passed
from slmops.optimizer.recipes.library import recipe_named
from slmops.optimizer.recipes.pipeline import Pipeline
from slmops.optimizer.recipes.spec import JobSpec

QUESTION = "the quick brown fox"
LENIENT = ProbeBudget(min_tokens_per_s=0, max_ttft_s=60, max_rss_bytes=10**12)


@pytest.fixture(params=["a model with a template", "a model without one"])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path) -> Pipeline:
    model = make_tiny(tmp_path / "hf", "llama", bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    save_tokenizer(model, llama3(), template=None if "without" in request.param else TEMPLATE)
    spec = JobSpec(recipes=(recipe_named("int8"),))
    return Pipeline(model, tmp_path / "work", spec, lambda what, share: None)


def package(folder: Path, how: PromptFormat, prompts: tuple[GoldenPrompt, ...]) -> Path:
    """Adds the manifest and the golden prompts to a genai folder."""
    layer = Descriptor(media_type=MODEL_CONFIG, digest=digest_of(b""), size=0)
    manifest = Manifest(config=layer, layers=(layer,), annotations={PROMPT_FORMAT: how})
    (folder / MANIFEST_PATH).write_bytes(manifest.encode())
    (folder / GOLDEN_PATH).write_text(dump_golden(prompts), encoding="utf-8")
    return folder


async def test_the_probe_gets_the_same_answer_as_the_optimizer(pipeline: Pipeline) -> None:
    exported = pipeline.export(pipeline.read())
    model, how = GenaiModel(exported), pipeline.prompt_format
    tokens = model.chat(QUESTION) if how is PromptFormat.CHAT else model.encode(QUESTION)
    *_, answer = model.answer(tokens, 12)
    right, wrong = (
        GoldenPrompt(prompt=QUESTION, expect=(text,), max_tokens=12) for text in (answer, "not this answer")
    )
    assert golden_passed(model, [right, wrong], how) == 1
    golden = read_golden(package(exported, how, (right, wrong)))
    runner = ProcessRunner(Release(digest_of(OCI_MANIFEST.encode()), "m", "1.0.0"), exported)
    await runner.start()
    try:
        report = await probe(runner, golden, LENIENT)
    finally:
        await runner.stop()
    assert [result.passed for result in report.results] == [True, False], report.reasons
