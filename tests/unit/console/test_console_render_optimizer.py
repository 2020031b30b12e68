"""Tables of jobs, recipes and evaluations fit the terminal and show all important values."""

from __future__ import annotations

from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
import yaml
from rich.console import Console, RenderableType
from unit.console.console_examples import AT, NOW

from slmops.console.render import optimizer as render
from slmops.contracts.commands import ParameterView, PassView
from slmops.contracts.evaluation import Evaluation, Figure, Verification
from slmops.contracts.jobs import JobState, JobView
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.contracts.search import SearchSpec

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
KNOWN = "best so far: int4, 93.7 MB, KL 0.17, 80 tokens/s; 2 of 4 on the front, 0:21:00 left"
RECIPE = Recipe(
    name="mine",
    description="Coarse and small.",
    passes=(PassSpec(pass_="quantize", params={"bits": 4}), PassSpec(pass_="pack")),
)
PASS = PassView(
    name="quantize",
    description="Weight quantization.",
    takes="float",
    gives="coded",
    parameters=(
        ParameterView(name="bits", kind="4 or 8", default=4, description="Bits of a weight"),
        ParameterView(name="share", kind="number > 0", required=True),
        ParameterView(name="symmetric", kind="boolean", default=False),
        ParameterView(name="embedding_bits", kind="4 or 8 or null"),
    ),
)
EVALUATION = Evaluation(
    bytes=93_700_000,
    kl=0.17,
    kl_low=0.15,
    kl_high=0.2,
    top1=0.8,
    ppl=21.5,
    reference_ppl=20.25,
    tokens_per_s=80.5,
    tasks={"everyday": 0.85},
    golden_passed=3,
    golden_total=4,
    joules_per_token=0.05,
    joules_source="modelled",
)
FOUND = Verification(
    agrees=False,
    figures=(
        Figure(name="kl", reported=0.17, found=0.25, agrees=False),
        Figure(name="top1", reported=0.8, found=0.8, agrees=True),
    ),
    differing=("variant/model.onnx",),
    tools=("torch 2.13.0 → 2.14.0",),
)


def job(state: JobState = JobState.RUNNING, **changes: Any) -> JobView:
    view = JobView(
        job="5f0c9d5e-5b1e-5c0a-9d7c-0a1b2c3d4e5f",
        work="w",
        model="smollm2",
        version="1.0.0",
        profile="edge-small",
        recipes=("int8", "mine"),
        search=SearchSpec(budget=timedelta(minutes=30), max_trials=12),
        state=state,
        step=KNOWN,
        done=6,
        of=15,
        worker="edge-lab/4711",
        reason="int4: smallest of 2 that pass",
        queued_at=AT,
        at=NOW,
    )
    return view.model_copy(update=changes)


def report() -> dict[str, Any]:
    digest = "sha256:" + "ab" * 32
    source = {"name": "evaluation.txt", "digest": digest}
    return {
        "recipe": {"name": "mine"},
        "evaluation": EVALUATION.model_dump(mode="json"),
        "variant_files": [{"path": "model.onnx", "digest": digest, "size_bytes": 93_700_000}],
        "evaluation_text": source,
        "windows": 6,
        "window_tokens": 256,
        "tasks": [{"name": "everyday", "digest": digest}],
        "intervals": "block bootstrap",
        "seed": 0,
        "tools": {"torch": "2.13.0"},
        "added_in_a_later_release": 1,
    }


def whole_report() -> dict[str, Any]:
    one = {"recipe": "mine", "evaluation": EVALUATION.model_dump(mode="json"), "verdict": {"passed": True}}
    failed = {"recipe": "torn", "evaluation": None, "verdict": {"passed": False}}
    front, choice = {"recipes": ["mine"]}, {"reason": "mine: smallest of 1 that pass"}
    return {"variants": [one, failed], "front": front, "choice": choice}


def shown(table: RenderableType, width: int) -> str:
    out = StringIO()
    Console(file=out, width=width, highlight=False).print(table)
    return out.getvalue()


MUST_SHOW = {
    "jobs": ["5f0c9d5e", "smollm2:1.0.0", "running", "6/15", "5 min", "best so far"],
    "job": ["5f0c9d5e-5b1e-5c0a-9d7c-0a1b2c3d4e5f", "for edge-small", "smallest, 30 min, 12 trials", "edge-lab/4711"],
    "recipes": ["mine", "quantize → pack", "Coarse and small."],
    "passes": ["quantize", "float → coded", "bits", "4 or 8", "required", "false", "none", "Bits of a weight"],
    "evaluation": ["93.7 MB", "0.1700 (0.1500–0.2000)", "80.0%", "reference 20.25", "85.0%", "3 of 4", "modelled",
                   "6 windows"],
    "whole": ["mine", "passed", "yes", "smallest of 1 that pass"],
    "verification": ["kl", "0.17", "0.25", "differs", "agrees", "not confirmed", "variant/model.onnx", "2.14.0"],
}  # fmt: skip


def tables(width: int) -> dict[str, RenderableType]:
    return {
        "jobs": render.jobs([job(), job(JobState.DONE)], NOW, width),
        "job": render.job(job(), NOW),
        "recipes": render.recipes([RECIPE]),
        "passes": render.passes([PASS]),
        "evaluation": render.evaluation(report()),
        "whole": render.evaluation(whole_report()),
        "verification": render.verification(FOUND),
    }


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", MUST_SHOW)
def test_a_table_fits_the_terminal_without_cutting_important_values(name: str, width: int) -> None:
    text = shown(tables(width)[name], width)
    assert max(map(len, text.splitlines())) <= width
    for word in MUST_SHOW[name]:
        assert word in " ".join(text.split())
    assert "…" not in text


def test_an_ended_job_shows_its_reason_and_a_running_job_its_progress() -> None:
    assert KNOWN in render.job_line(job())
    assert "smallest of 2" in render.job_line(job(JobState.DONE))
    assert "6/15" not in shown(render.job(job(JobState.DONE), NOW), 80)


def test_a_recipe_is_shown_in_a_form_that_can_be_saved() -> None:
    assert Recipe.model_validate(yaml.safe_load(render.recipe(RECIPE)), extra="forbid") == RECIPE


def test_foreign_text_is_not_interpreted_by_the_terminal() -> None:
    assert "\x1b" not in shown(render.jobs([job(step=ESCAPE, reason=ESCAPE)], NOW, 80), 80)
    assert "\x1b" not in render.job_line(job(step=ESCAPE))


def test_an_empty_list_of_jobs_shows_the_next_command() -> None:
    assert "slmops optimize" in shown(render.jobs([], NOW, 80), 80)
