"""A variant against the full-precision reference: the same tokens through both, position by position."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import InvalidModel, OptimizationFailed
from slmops.contracts.evaluation import Evaluation
from slmops.optimizer.benchmark import benchmark

WINDOWS, WINDOW_TOKENS = 6, 256
TEXT = files("slmops.optimizer") / "data" / "evaluation.txt"


@dataclass(frozen=True)
class Reference:
    """`tokens` [windows, positions]; `log_probs` [windows, positions, vocabulary], natural logarithm, float32."""

    tokens: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]
    ppl: float


def reference(hf_dir: Path) -> Reference:
    """Run the float32 model over the bundled text. Raises `InvalidModel`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    length = min(WINDOW_TOKENS, len(ids))
    count = min(WINDOWS, len(ids) // length) if length > 1 else 0
    if not count:
        raise InvalidModel("the tokenizer makes no tokens of a text", where=str(hf_dir), fix="Check tokenizer.json.")
    tokens = np.array(ids[: count * length], dtype=np.int64).reshape(count, length)
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        log_probs = np.stack([_log_softmax(model(torch.from_numpy(row[None])).logits[0].numpy()) for row in tokens])
    return Reference(
        tokens, log_probs, _perplexity([_losses(lp, row) for lp, row in zip(log_probs, tokens, strict=True)])
    )


def evaluate(variant: Path, against: Reference) -> Evaluation:
    """Measure the genai folder `variant`. A NaN in its logits is a NaN in the figures. Raises `OptimizationFailed`."""
    divergences, agreements, losses = [], [], []
    logits_of = _Onnx(variant)
    for row, expected in zip(against.tokens, against.log_probs, strict=True):
        found = _log_softmax(logits_of(row))
        if found.shape != expected.shape:
            raise OptimizationFailed(
                f"the variant's vocabulary is {found.shape[1]}, not {expected.shape[1]}", where=str(variant)
            )
        divergences.append(np.sum(np.exp(expected) * (expected - found), axis=-1).mean())
        agreements.append(np.mean(expected.argmax(-1) == found.argmax(-1)))
        losses.append(_losses(found, row))
    del logits_of  # its memory would slow the benchmark down
    speed = benchmark(variant)
    return Evaluation(
        bytes=sum(path.stat().st_size for path in variant.rglob("*") if path.is_file()),
        kl=float(np.mean(divergences)),
        top1=float(np.mean(agreements)),
        ppl=_perplexity(losses),
        reference_ppl=against.ppl,
        tokens_per_s=speed.tokens_per_s,
        ttft_s=speed.ttft_s,
        peak_rss_bytes=speed.peak_rss_bytes,
    )


class _Onnx:
    """The variant's graph without its cache: tokens [positions] of one window to logits [positions, vocabulary]."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime as ort

        decoder = json.loads((folder / "genai_config.json").read_bytes())["model"]["decoder"]
        options = ort.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as OMP_WAIT_POLICY in the job
        self.session = ort.InferenceSession(folder / decoder["filename"], options, providers=["CPUExecutionProvider"])
        self.empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), dtype=np.float32)

    def __call__(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        known = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, len(tokens)), dtype=np.int64),
            "position_ids": np.arange(len(tokens), dtype=np.int64)[None],
        }
        feed: dict[str, Any] = {node.name: known.get(node.name, self.empty) for node in self.session.get_inputs()}
        logits: npt.NDArray[np.float32] = self.session.run(["logits"], feed)[0][0]
        return logits


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import torch  # several times as fast as numpy here, and this is a third of an evaluation

    found: npt.NDArray[np.float32] = torch.log_softmax(torch.from_numpy(logits).float(), dim=-1).numpy()
    return found


def _losses(log_probs: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Negative log-likelihood of each token given those before it in the window; the first has none."""
    return -log_probs[np.arange(len(tokens) - 1), tokens[1:]]


def _perplexity(losses: list[npt.NDArray[np.float32]]) -> float:
    mean = float(np.concatenate(losses).mean())
    return math.exp(mean) if mean < 700 else mean * math.inf  # NaN stays NaN, what exp cannot hold is infinite
