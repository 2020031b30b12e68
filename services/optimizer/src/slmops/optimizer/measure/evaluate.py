"""Compares a variant with the full-precision reference: runs the same tokens through both, position by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import InvalidMessage, OptimizationFailed
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.contracts.prompts.prompt_format import PromptFormat
from slmops.contracts.prompts.tasks import Task
from slmops.optimizer.intake.graph import Graph
from slmops.optimizer.measure.benchmark import Questions, benchmark
from slmops.optimizer.measure.bootstrap import interval
from slmops.optimizer.measure.tasks import bundled_tasks
from slmops.optimizer.measure.texts import Text, evaluation_text, tokens_of, windows_from

WINDOWS, WINDOW_TOKENS = 6, 256

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """The reference's results: `tokens` [windows, positions] of `text`, and natural `log_probs` [windows, positions,
    vocabulary] in float32. The whole text has `text_tokens` tokens."""

    tokens: npt.NDArray[np.int64]
    log_probs: Rows
    ppl: float
    text: Text
    text_tokens: int


@dataclass(frozen=True)
class Fidelity:
    """The comparison of both models on the same tokens. The names are those of `Evaluation`."""

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
    """Runs the float32 model over windows of `text`, by default the bundled one.

    These are the first windows of the bundled text, and windows that are evenly spread over an own text, because the
    first ones would all be of its first file.

    Raises `InvalidMessage` if the text does not fill a window, and `InvalidModel`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = text or evaluation_text()
    tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    ids = tokens_of(tokenizer, text)
    tokens = windows_from(tokenizer, ids, window_tokens)
    if len(tokens) > windows:
        tokens = tokens[np.linspace(0, len(tokens) - 1, windows).round().astype(int)] if text.own else tokens[:windows]
    if not len(tokens):
        raise InvalidMessage(
            f"the evaluation text has fewer than {window_tokens} tokens",
            where=text.name,
            fix=f"Use a text of at least {windows * window_tokens} tokens.",
        )
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():  # all windows at once is a third faster than one by one
        log_probs: Rows = torch.log_softmax(model(torch.from_numpy(tokens), use_cache=False).logits, dim=-1).numpy()
    losses = np.stack([_losses(found, row) for found, row in zip(log_probs, tokens, strict=True)])
    return Reference(tokens, log_probs, _exp(float(losses.mean())), text, len(ids))


def evaluate(
    variant: Path,
    against: Reference,
    *,
    golden: Sequence[GoldenPrompt] = (),
    tasks: Sequence[Task] | None = None,
    seed: int = 0,
    prompt_format: PromptFormat = PromptFormat.CHAT,
) -> Evaluation:
    """Measures the genai folder `variant`. Without `tasks` it uses the bundled ones. Golden prompts are asked in
    `prompt_format`.

    Speed is measured too, so call it when nothing else computes. NaN in the logits gives NaN in the figures. Raises
    `OptimizationFailed`.
    """
    questions = Questions(
        golden=tuple(golden),
        tasks=bundled_tasks() if tasks is None else tuple(tasks),
        prompt_format=prompt_format,
    )
    with benchmark(variant, questions) as process:
        speed = process.speed()
        compared = fidelity(variant, against, seed)  # meanwhile the process answers, which takes one core
        answers = process.answers()
    return Evaluation(
        bytes=sum(path.stat().st_size for path in variant.rglob("*") if path.is_file()),
        **asdict(compared),
        **speed.model_dump(),
        tasks=answers.tasks,
        golden_passed=answers.golden_passed if golden else None,
        golden_total=len(golden) if golden else None,
    )


def fidelity(variant: Path, against: Reference, seed: int = 0) -> Fidelity:
    """Measures KL, top-1 agreement and perplexity with their intervals. Raises `OptimizationFailed`."""
    logits_of = Graph(variant)
    rows = [
        _compare(logits_of(row), expected, row, variant)
        for row, expected in zip(against.tokens, against.log_probs, strict=True)
    ]
    divergences, agreements, losses = (np.stack(part) for part in zip(*rows, strict=True))
    kl, top1, loss = (float(values.mean(dtype=np.float64)) for values in (divergences, agreements, losses))
    kl_low, kl_high = interval(divergences, seed)
    top1_low, top1_high = interval(agreements, seed)
    ppl, ppl_low, ppl_high = map(_exp, (loss, *interval(losses, seed)))
    return Fidelity(kl, kl_low, kl_high, top1, top1_low, top1_high, ppl, ppl_low, ppl_high, against.ppl)


def _compare(logits: Rows, expected: Rows, tokens: npt.NDArray[np.int64], variant: Path) -> tuple[Rows, Rows, Rows]:
    """Returns divergence and agreement [positions] and loss [positions - 1] of one window.

    Agreement is NaN where the logits are NaN.
    """
    import torch  # much faster than numpy here, and this is a third of an evaluation

    if logits.shape != expected.shape:
        raise OptimizationFailed(
            f"the variant has {logits.shape[1]} tokens, the reference {expected.shape[1]}",
            where=str(variant),
            fix="Leave prune-vocabulary out of the recipe.",
        )
    theirs, ours = torch.from_numpy(expected), torch.log_softmax(torch.from_numpy(logits), dim=-1)
    divergence = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    agreement = (theirs.argmax(-1) == ours.argmax(-1)).float()
    agreement[divergence.isnan()] = math.nan  # argmax treats NaN as the largest number
    return divergence.numpy(), agreement.numpy(), _losses(ours.numpy(), tokens)


def _losses(log_probs: Rows, tokens: npt.NDArray[np.int64]) -> Rows:
    """Returns the negative log-likelihood of each token, given the previous ones; the first token has none."""
    return -log_probs[np.arange(len(tokens) - 1), tokens[1:]]


def _exp(value: float) -> float:
    """Returns exp(value): infinity on overflow, NaN for NaN."""
    return math.exp(value) if value < 700 else value * math.inf
