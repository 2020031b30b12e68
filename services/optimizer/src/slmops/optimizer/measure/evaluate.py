"""A variant against the full-precision reference: the same tokens through both, position by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import InvalidMessage, OptimizationFailed
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.golden import GoldenPrompt
from slmops.optimizer.intake.graph import Graph
from slmops.optimizer.measure.benchmark import Questions, benchmark
from slmops.optimizer.measure.bootstrap import interval
from slmops.optimizer.measure.tasks import Task, bundled_tasks
from slmops.optimizer.measure.texts import Text, evaluation_text, windows_of

WINDOWS, WINDOW_TOKENS = 6, 256

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """`tokens` [windows, positions] of `text`; `log_probs` [windows, positions, vocabulary], natural, float32."""

    tokens: npt.NDArray[np.int64]
    log_probs: Rows
    ppl: float
    text: Text


@dataclass(frozen=True)
class Fidelity:
    """What both models make of the same tokens; every name as in `Evaluation`."""

    kl: float
    kl_low: float
    kl_high: float
    top1: float
    top1_low: float
    top1_high: float
    ppl: float
    ppl_low: float
    ppl_high: float
    reference_ppl: float


def reference(
    hf_dir: Path, text: Text | None = None, *, windows: int = WINDOWS, window_tokens: int = WINDOW_TOKENS
) -> Reference:
    """Run the float32 model over the first windows of `text`, by default the bundled one.

    Raises `InvalidMessage` if the text does not fill a window, and `InvalidModel`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = text or evaluation_text()
    tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    tokens = windows_of(tokenizer, text, window_tokens)[:windows]
    if not len(tokens):
        raise InvalidMessage(
            f"the evaluation text has fewer than {window_tokens} tokens",
            where=text.name,
            fix=f"Give a text of {windows * window_tokens} tokens.",
        )
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():  # all windows at once: a third faster than one by one
        log_probs: Rows = torch.log_softmax(model(torch.from_numpy(tokens), use_cache=False).logits, dim=-1).numpy()
    losses = np.stack([_losses(found, row) for found, row in zip(log_probs, tokens, strict=True)])
    return Reference(tokens, log_probs, _exp(float(losses.mean())), text)


def evaluate(
    variant: Path,
    against: Reference,
    *,
    golden: Sequence[GoldenPrompt] = (),
    tasks: Sequence[Task] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure the genai folder `variant`; `tasks` None is the bundled ones. NaN in its logits is NaN in the figures.

    Speed is measured too: call it when nothing else computes. Raises `OptimizationFailed`.
    """
    asked = Questions(golden=tuple(golden), tasks=bundled_tasks() if tasks is None else tuple(tasks))
    with benchmark(variant, asked) as process:
        speed = process.speed()
        same = fidelity(variant, against, seed)  # while it answers, which takes one core
        answers = process.answers()
    return Evaluation(
        bytes=sum(path.stat().st_size for path in variant.rglob("*") if path.is_file()),
        **asdict(same),
        **speed.model_dump(),
        tasks=answers.tasks,
        golden_passed=answers.golden_passed if golden else None,
        golden_total=len(golden) if golden else None,
    )


def fidelity(variant: Path, against: Reference, seed: int = 0) -> Fidelity:
    """KL, top-1 agreement and perplexity with their intervals. Raises `OptimizationFailed`."""
    logits_of = Graph(variant)
    rows = [
        _compared(logits_of(row), expected, row, variant)
        for row, expected in zip(against.tokens, against.log_probs, strict=True)
    ]
    divergences, agreements, losses = (np.stack(part) for part in zip(*rows, strict=True))
    kl, top1, loss = (float(values.mean(dtype=np.float64)) for values in (divergences, agreements, losses))
    kl_low, kl_high = interval(divergences, seed)
    top1_low, top1_high = interval(agreements, seed)
    ppl, ppl_low, ppl_high = map(_exp, (loss, *interval(losses, seed)))
    return Fidelity(kl, kl_low, kl_high, top1, top1_low, top1_high, ppl, ppl_low, ppl_high, against.ppl)


def _compared(logits: Rows, expected: Rows, tokens: npt.NDArray[np.int64], variant: Path) -> tuple[Rows, Rows, Rows]:
    """Of one window: divergence and agreement [positions], loss [positions - 1]. Agreement with NaN is NaN."""
    import torch  # several times as fast as numpy here, and this is a third of an evaluation

    if logits.shape != expected.shape:
        raise OptimizationFailed(
            f"the variant's vocabulary is {logits.shape[1]}, not {expected.shape[1]}", where=str(variant)
        )
    theirs, ours = torch.from_numpy(expected), torch.log_softmax(torch.from_numpy(logits), dim=-1)
    divergence = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    agreement = (theirs.argmax(-1) == ours.argmax(-1)).float()
    agreement[divergence.isnan()] = math.nan  # argmax takes NaN for the largest number
    return divergence.numpy(), agreement.numpy(), _losses(ours.numpy(), tokens)


def _losses(log_probs: Rows, tokens: npt.NDArray[np.int64]) -> Rows:
    """Negative log-likelihood of each token given those before it in the window; the first has none."""
    return -log_probs[np.arange(len(tokens) - 1), tokens[1:]]


def _exp(value: float) -> float:
    """NaN stays NaN, and what `exp` cannot hold is infinite."""
    return math.exp(value) if value < 700 else value * math.inf
