"""A real variant of a tiny model is compared with its reference, and broken values give NaN."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_model import make_tiny_llama

from slmops.contracts.errors import InvalidMessage, OptimizationFailed
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.optimizer.intake.export import build
from slmops.optimizer.measure.benchmark import benchmark, repetition
from slmops.optimizer.measure.evaluate import WINDOW_TOKENS, Fidelity, Reference, evaluate, fidelity, reference
from slmops.optimizer.measure.tasks import parse_task
from slmops.optimizer.measure.texts import Text, evaluation_text

FIGURES = [field.name for field in dataclasses.fields(Fidelity) if field.name != "reference_ppl"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def against(full: Path) -> Reference:
    return reference(full)


@pytest.fixture(scope="module")
def variants(full: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("variants")
    return {bits: build(full, folder / bits, bits, {}) for bits in ("fp32", "int8", "int4")}


@pytest.fixture(scope="module")
def measured(variants: dict[str, Path], against: Reference) -> dict[str, Fidelity]:
    return {bits: fidelity(folder, against) for bits, folder in variants.items()}


def ends(found: Fidelity, name: str) -> tuple[float, float, float]:
    return getattr(found, f"{name}_low"), getattr(found, name), getattr(found, f"{name}_high")


def test_fewer_bits_are_further_from_the_reference_and_the_intervals_agree(measured: dict[str, Fidelity]) -> None:
    assert measured["fp32"].kl == pytest.approx(0, abs=1e-5)
    assert measured["fp32"].ppl == pytest.approx(measured["fp32"].reference_ppl, rel=1e-3)
    assert measured["fp32"].top1 > 0.995
    assert measured["fp32"].kl_high < measured["int8"].kl_low < measured["int8"].kl_high < measured["int4"].kl_low
    assert measured["int4"].top1_high < measured["int8"].top1_low
    for found in measured.values():
        for name in ("kl", "top1", "ppl"):
            low, value, high = ends(found, name)
            assert low <= value <= high


def test_the_figures_match_their_definitions(
    variants: dict[str, Path], against: Reference, measured: dict[str, Fidelity]
) -> None:
    from slmops.optimizer.intake.graph import Graph

    graph, kl, top1, loss = Graph(variants["int4"]), [], [], []
    for row, expected in zip(against.tokens, against.log_probs.astype(np.float64), strict=True):
        logits = graph(row).astype(np.float64)
        found = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        kl += list((np.exp(expected) * (expected - found)).sum(-1))
        top1 += list(expected.argmax(-1) == found.argmax(-1))
        loss += [-found[place, token] for place, token in enumerate(row[1:])]
    assert measured["int4"].kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert measured["int4"].top1 == pytest.approx(np.mean(top1))
    assert measured["int4"].ppl == pytest.approx(np.exp(np.mean(loss)), rel=1e-4)


def test_an_evaluation_contains_every_figure(variants: dict[str, Path], against: Reference, measured) -> None:
    choice = {"question": "Is it?", "choices": ["yes", "no"], "answer": 0}
    tasks = [parse_task("mine", json.dumps(choice)), parse_task("turned", json.dumps({**choice, "answer": 1}))]
    golden = [GoldenPrompt(prompt="x", expect=("never said",)), GoldenPrompt(prompt="x", expect=("neither",))]
    found = evaluate(variants["int4"], against, golden=golden, tasks=tasks)
    assert {name for name, value in found if value is None} == set()
    assert {name: getattr(found, name) for name in FIGURES} == {n: getattr(measured["int4"], n) for n in FIGURES}
    assert (found.golden_passed, found.golden_total) == (0, 2)
    assert sorted(found.tasks.values()) == [0, 1]
    assert 0 <= found.repetition <= 1
    assert found.joules_per_token > 0
    assert found.joules_source in ("measured", "modelled")
    assert found.bytes == sum(path.stat().st_size for path in variants["int4"].iterdir())
    # The evaluating process has torch loaded; the variant's process does not.
    assert 20_000_000 < found.peak_rss_bytes < 250_000_000


def test_without_golden_prompts_only_the_bundled_task_is_measured(
    variants: dict[str, Path], against: Reference
) -> None:
    found = evaluate(variants["fp32"], against)
    assert (found.golden_passed, found.golden_total) == (None, None)
    assert list(found.tasks) == ["everyday"]
    again = Evaluation.model_validate_json(found.model_dump_json())
    assert again == found


def test_nan_weights_give_nan_figures(variants: dict[str, Path], against: Reference, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(variants["int8"], tmp_path / "broken"))
    data = broken / "model.onnx.data"
    data.write_bytes(b"\xff" * data.stat().st_size)  # as float32, every bit set is a NaN
    found = evaluate(broken, against)
    assert all(math.isnan(getattr(found, name)) for name in FIGURES)
    assert math.isnan(found.tasks["everyday"])
    assert math.isnan(Evaluation.model_validate_json(found.model_dump_json()).tasks["everyday"])


def test_a_reference_with_one_nan_gives_nan_figures(variants: dict[str, Path], against: Reference) -> None:
    log_probs = against.log_probs.copy()
    log_probs[1, 3] = math.nan
    found = fidelity(variants["fp32"], dataclasses.replace(against, log_probs=log_probs))
    assert math.isnan(found.kl)
    assert math.isnan(found.top1)


def test_another_vocabulary_is_refused(variants: dict[str, Path], against: Reference) -> None:
    other = dataclasses.replace(against, log_probs=against.log_probs[..., :-1])
    with pytest.raises(OptimizationFailed, match="variant has 320 tokens, the reference 319"):
        fidelity(variants["fp32"], other)


def test_a_variant_that_does_not_run_is_refused_with_its_reason(
    variants: dict[str, Path], against: Reference, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(variants["fp32"], tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(
        OptimizationFailed, match=r"the variant does not generate: RuntimeError: Load model .* \(code 1\)"
    ):
        evaluate(broken, against)
    with benchmark(broken) as process, pytest.raises(OptimizationFailed):
        process.speed()


def test_the_caller_chooses_the_text_and_the_windows(full: Path, against: Reference) -> None:
    assert (against.tokens.shape, against.text.name) == ((6, WINDOW_TOKENS), "evaluation.txt")
    content = "A lazy dog answers the small fox. " * 40
    found = reference(full, Text("mine", content), windows=2, window_tokens=64)
    assert (found.tokens.shape, found.log_probs.shape, found.text.name) == ((2, 64), (2, 64, 320), "mine")
    assert found.ppl != against.ppl


def test_a_text_shorter_than_a_window_is_refused(full: Path) -> None:
    with pytest.raises(InvalidMessage, match="fewer than 256 tokens"):
        reference(full, Text("short", "the quick brown fox"))


def test_a_loop_has_repetition_and_a_list_has_none() -> None:
    assert repetition(range(64)) == 0
    assert repetition([5] * 64) == pytest.approx(60 / 61)
    assert repetition([*range(32)] * 2) == pytest.approx(29 / 61)


def test_an_evaluation_of_an_older_release_is_read() -> None:
    old = '{"bytes": 7, "kl": "NaN", "top1": 0.5}'
    found = Evaluation.model_validate_json(old)
    assert (found.kl_high, found.tasks, found.joules_source) == (None, {}, None)


def test_the_bundled_text_fills_six_windows_of_a_large_vocabulary() -> None:
    """Assumes that a token of a real tokenizer is at most about 5 characters of English text."""
    assert len(evaluation_text().content) / 4.4 > 6 * WINDOW_TOKENS
