"""Recovers quality by distillation (Hinton et al. 2015): the model learns the reference's next-token distribution.

Embedding and head are not trained: earlier passes change only their number of rows, and Adam would also move the rows
of tokens that do not occur in the text. Weights that are zero stay zero, so a sparse model stays sparse.
"""

from __future__ import annotations

import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, model_validator

from slmops.contracts.errors import OptimizationFailed
from slmops.optimizer.passes import Context, Params, Tokens, decoder

if TYPE_CHECKING:
    import torch

_STATE = "state.pt"
_WARM_UP = 0.05  # share of the budget
_BATCH_TOKENS = 512  # larger batches are not faster on a CPU, and their logits take memory
TELL_S = 2.0


class Distill(Params):
    minutes: float | None = Field(default=None, gt=0, description="Time budget; the result depends on the host")
    tokens: int | None = Field(default=None, ge=1, description="Token budget; the same seed gives the same result")
    temperature: float = Field(default=1.0, gt=0, description="Above 1, the teacher's unlikely tokens count more")
    hidden: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the relative error of the hidden states of all layers, added to the divergence",
    )
    learning_rate: float = Field(default=3e-4, gt=0, description="Peak learning rate, with warm-up and cosine decay")
    step_tokens: int = Field(default=1024, ge=1, description="Tokens per optimizer step")
    checkpoint_s: float = Field(default=180, ge=0, description="Seconds between checkpoints")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.minutes is None and self.tokens is None:
            raise ValueError("distill needs a budget: set minutes, tokens or both")
        return self

    def share(self, seconds: float, tokens: int) -> float:
        """Returns the share of the budget that is spent; training ends at 1."""
        spent = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(spent, tokens / self.tokens) if self.tokens else spent


def run(given: Path, out: Path, params: Distill, context: Context) -> None:
    """Runs the pass; a killed run continues from its last checkpoint, which is in a folder beside `out`.

    Raises `OptimizationFailed` if training diverges.
    """
    training = _Training(given, params, context)
    folder = out.with_name(out.name + ".checkpoint")
    training.restore(folder)
    training.finish(folder)
    decoder.save(training.student, given, out)
    shutil.rmtree(folder, ignore_errors=True)


class _Training:
    """The training of one student. It is determined by step, seed and budget, unless the budget is a time."""

    def __init__(self, given: Path, params: Distill, context: Context) -> None:
        import torch

        self._params, self._context = params, context
        self._windows, self._kept = decoder.calibration(given, context), decoder.kept_tokens(given)
        self._teacher, self.student = decoder.load(context.reference), decoder.load(given)
        self._weights = _trainable(self.student)
        self._adam = torch.optim.AdamW(self._weights.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._per_step = max(1, params.step_tokens // self._windows.shape[1])
        self._steps, self._start = 0, context.clock_s()

    @property
    def _seconds(self) -> float:
        return self._context.clock_s() - self._start

    @property
    def _share(self) -> float:
        return self._params.share(self._seconds, self._steps * self._per_step * self._windows.shape[1])

    def restore(self, folder: Path) -> None:
        import torch

        if not (folder / _STATE).exists():
            return
        state = torch.load(folder / _STATE, weights_only=True)
        for name, weight in self._weights.items():
            weight.data.copy_(state["weights"][name])
        self._adam.load_state_dict(state["adam"])
        self._steps, self._start = state["steps"], self._context.clock_s() - state["seconds"]

    def _save(self, folder: Path) -> None:
        import torch

        folder.mkdir(exist_ok=True)
        state = {"weights": self._weights, "adam": self._adam.state_dict()}
        torch.save(state | {"steps": self._steps, "seconds": self._seconds}, folder / f"{_STATE}.part")
        os.replace(folder / f"{_STATE}.part", folder / _STATE)

    def finish(self, folder: Path) -> None:
        """Trains until the budget is spent."""
        saved = reported = self._seconds
        while (share := self._share) < 1:
            divergence = self._step(share)
            if self._seconds - reported > TELL_S:
                self._context.tell(f"distilling, KL {divergence:.3f}", share)
                reported = self._seconds
            if self._seconds - saved >= self._params.checkpoint_s:
                self._save(folder)
                saved = self._seconds

    def _step(self, share: float) -> float:
        """Runs one optimizer step; returns the mean divergence on its windows."""
        self._adam.param_groups[0]["lr"] = self._params.learning_rate * _schedule(share)
        mean = 0.0
        for batch in self._batches():
            divergence, loss = self._loss(batch)
            (loss * len(batch) / self._per_step).backward()
            mean += float(divergence.detach()) * len(batch) / self._per_step
        if not math.isfinite(mean):
            raise OptimizationFailed(
                f"the training diverged after {self._steps} steps", fix="Use a lower learning_rate in distill."
            )
        self._adam.step()
        self._adam.zero_grad()
        self._steps += 1
        return mean

    def _batches(self) -> list[Tokens]:
        """Returns the windows of this step. Every epoch uses all windows once, in its own random order."""
        first = self._steps * self._per_step
        places = [divmod(number, len(self._windows)) for number in range(first, first + self._per_step)]
        orders = {e: np.random.default_rng([self._context.seed, e]).permutation(len(self._windows)) for e, _ in places}
        chosen = self._windows[[orders[epoch][place] for epoch, place in places]]
        return np.array_split(chosen, math.ceil(chosen.size / _BATCH_TOKENS))

    def _loss(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the divergence in nats per token at the temperature, and the loss."""
        import torch

        with torch.no_grad():
            teacher: Any = self._teacher(
                input_ids=torch.from_numpy(tokens if self._kept is None else self._kept[tokens]),
                output_hidden_states=self._params.hidden > 0,
                use_cache=False,
            )
        student: Any = self.student(
            input_ids=torch.from_numpy(tokens), output_hidden_states=self._params.hidden > 0, use_cache=False
        )
        expected = teacher.logits if self._kept is None else teacher.logits[..., self._kept]
        divergence = _divergence(student.logits, expected, self._params.temperature)
        if not self._params.hidden:
            return divergence, divergence
        return divergence, divergence + self._params.hidden * _distance(student.hidden_states, teacher.hidden_states)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns KL(teacher || student) per token times the squared temperature, which keeps the size of gradients."""
    import torch

    found, expected = (torch.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    total = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
    return total * temperature**2 / found[..., 0].numel()


def _distance(student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns the squared relative distance, mean over tokens and layers; if layers were dropped, of the last layer."""
    import torch

    pairs = list(zip(student, teacher, strict=False))[1:]  # the first are both the embedding
    if len(student) != len(teacher):
        pairs = [(student[-1], teacher[-1])]
    return torch.stack([((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in pairs]).mean()


def _trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """Returns all parameters except embedding and head; masks the gradients of weights that are zero."""
    model.requires_grad_(False)
    fixed = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = {name: weight for name, weight in model.named_parameters() if id(weight) not in fixed}
    for weight in weights.values():
        weight.requires_grad_(True)
        if weight.ndim == 2 and not (alive := weight.data != 0).all():
            weight.register_post_accumulate_grad_hook(partial(_mask, alive))
    return weights


def _mask(alive: torch.Tensor, weight: torch.Tensor) -> None:
    assert weight.grad is not None
    weight.grad.mul_(alive)


def _schedule(share: float) -> float:
    return min(1.0, 0.1 + share / _WARM_UP) * (1 + math.cos(math.pi * share)) / 2
