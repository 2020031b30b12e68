"""Recovery by distillation (Hinton et al. 2015): the cut model learns the reference's distribution of every next token.

Embedding and head stay as they are: no pass before this one changes more than their number of rows, and Adam would
move the rows of tokens that the text does not have as far as all others. Zeros stay zero: a sparse model stays sparse.
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
_WARM_UP = 0.05  # of the budget
_BATCH_TOKENS = 512  # at a time through both models: more is not faster on a CPU, and logits take memory
TELL_S = 2.0


class Distill(Params):
    minutes: float | None = Field(default=None, gt=0, description="Budget of wall time; the result depends on the host")
    tokens: int | None = Field(default=None, ge=1, description="Budget of tokens; same seed, same result")
    temperature: float = Field(default=1.0, gt=0, description="Above 1 the teacher's unlikely tokens count more")
    hidden: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the hidden states' relative error, layer by layer, beside the divergence",
    )
    learning_rate: float = Field(default=3e-4, gt=0, description="Peak; warmed up, then a cosine down to zero")
    step_tokens: int = Field(default=1024, ge=1, description="Tokens between two changes of the weights")
    checkpoint_s: float = Field(default=180, ge=0, description="Seconds between checkpoints")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.minutes is None and self.tokens is None:
            raise ValueError("give a budget: minutes, tokens or both")
        return self

    def share(self, seconds: float, tokens: int) -> float:
        """Of the budget that is spent; 1 and more ends it."""
        spent = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(spent, tokens / self.tokens) if self.tokens else spent


def run(given: Path, out: Path, params: Distill, context: Context) -> None:
    """A killed run continues from its last checkpoint, beside `out`. Raises `OptimizationFailed` if it diverges."""
    training = _Training(given, params, context)
    folder = out.with_name(out.name + ".checkpoint")
    training.restore(folder)
    training.finish(folder)
    decoder.save(training.student, given, out)
    shutil.rmtree(folder, ignore_errors=True)


class _Training:
    """One student on its way. What it does follows from step, seed and budget alone, unless the budget is time."""

    def __init__(self, given: Path, params: Distill, context: Context) -> None:
        import torch

        self._params, self._context = params, context
        self._windows, self._kept = decoder.calibration(given, context), decoder.kept_tokens(given)
        self._teacher, self.student = decoder.load(context.reference), decoder.load(given)
        self._weights = _trained(self.student)
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

    def _keep(self, folder: Path) -> None:
        import torch

        folder.mkdir(exist_ok=True)
        state = {"weights": self._weights, "adam": self._adam.state_dict()}
        torch.save(state | {"steps": self._steps, "seconds": self._seconds}, folder / f"{_STATE}.part")
        os.replace(folder / f"{_STATE}.part", folder / _STATE)

    def finish(self, folder: Path) -> None:
        """Train until the budget is spent."""
        kept = told = self._seconds
        while (share := self._share) < 1:
            divergence = self._step(share)
            if self._seconds - told > TELL_S:
                self._context.tell(f"distilling, KL {divergence:.3f}", share)
                told = self._seconds
            if self._seconds - kept >= self._params.checkpoint_s:
                self._keep(folder)
                kept = self._seconds

    def _step(self, share: float) -> float:
        """Change the weights once, after the windows of one step; the mean divergence on them."""
        self._adam.param_groups[0]["lr"] = self._params.learning_rate * _schedule(share)
        mean = 0.0
        for batch in self._batches():
            divergence, loss = self._loss(batch)
            (loss * len(batch) / self._per_step).backward()
            mean += float(divergence.detach()) * len(batch) / self._per_step
        if not math.isfinite(mean):
            raise OptimizationFailed(
                f"the training diverged after {self._steps} steps", fix="Give distill a lower learning_rate."
            )
        self._adam.step()
        self._adam.zero_grad()
        self._steps += 1
        return mean

    def _batches(self) -> list[Tokens]:
        """The windows of this step. Every window comes once in an order of its own, then again in another."""
        first = self._steps * self._per_step
        places = [divmod(number, len(self._windows)) for number in range(first, first + self._per_step)]
        orders = {e: np.random.default_rng([self._context.seed, e]).permutation(len(self._windows)) for e, _ in places}
        chosen = self._windows[[orders[epoch][place] for epoch, place in places]]
        return np.array_split(chosen, math.ceil(chosen.size / _BATCH_TOKENS))

    def _loss(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Divergence in nats per token at the temperature, and what is minimized."""
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
    """KL(teacher || student) per token, times temperature squared, so that gradients keep their size."""
    import torch

    found, expected = (torch.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    total = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
    return total * temperature**2 / found[..., 0].numel()


def _distance(student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Squared distance by squared length, mean over tokens and layers; of the last alone if layers were dropped."""
    import torch

    pairs = list(zip(student, teacher, strict=False))[1:]  # the first are both the embedding
    if len(student) != len(teacher):
        pairs = [(student[-1], teacher[-1])]
    return torch.stack([((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in pairs]).mean()


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """Every parameter but embedding and head; the gradient of a weight that is zero is zero."""
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
