"""Loads a float model as a sequence of decoder layers and runs, cuts and refits the layers one by one.

The float passes change layers in memory. They run each layer on all calibration windows before the next one. In this
way a pruned model and its original run side by side, and every layer is refitted to the inputs that it really gets.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.contracts.errors import OptimizationFailed, UnsupportedArchitecture
from slmops.optimizer.passes import Context, Tokens

if TYPE_CHECKING:
    import torch

KEPT_TOKENS = "kept_tokens.npy"
"""A file in folders with a pruned vocabulary: the reference's token id of every token, int64 [vocabulary]."""

_RIDGE = 0.01  # times the mean diagonal; GPTQ and SparseGPT damp their Hessians in the same way
_BATCH = 4  # windows; larger batches are not faster on a CPU
_DROP_STEP = 1 / 256  # share of the groups that is dropped before the others are measured again


def load(folder: Path) -> Any:
    """Loads a model in float32 for inference. Raises `UnsupportedArchitecture` if it is not a sequence of layers."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    decoder_layers(model)
    return model.eval()


def save(model: Any, given: Path, out: Path, *, leave_out: Sequence[str] = ()) -> None:
    """Saves the weights and configuration of `model`; copies tokenizer, template and all other files from `given`."""
    model.save_pretrained(out)
    for path in sorted(given.iterdir()):
        weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in leave_out and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def calibration(given: Path, context: Context, tokens: int | None = None) -> Tokens:
    """Returns about `tokens` calibration tokens as [windows, positions], spread over the text, in `given`'s vocabulary.

    Windows with a token that `given` no longer has are left out. Raises `OptimizationFailed` if no window is left.
    """
    windows, kept = context.calibration(), kept_tokens(given)
    if kept is not None:
        windows = _renumbered(windows, kept)
    if not windows.size:
        raise OptimizationFailed(
            "the pruned vocabulary covers no window of the calibration text",
            where=str(given),
            fix="Use more calibration text, or keep more of the vocabulary.",
        )
    count = len(windows) if tokens is None else min(len(windows), max(1, tokens // windows.shape[1]))
    chosen: Tokens = windows[np.linspace(0, len(windows) - 1, count).astype(np.int64)]
    return chosen


def kept_tokens(given: Path) -> Tokens | None:
    """Returns the reference's token id of every token; None if the vocabulary was not pruned."""
    path = given / KEPT_TOKENS
    return np.load(path) if path.exists() else None


def _renumbered(windows: Tokens, kept: Tokens) -> Tokens:
    numbers = np.full(max(int(kept.max()), int(windows.max())) + 1, -1, dtype=np.int64)
    numbers[kept] = np.arange(len(kept))
    renumbered: Tokens = numbers[windows]
    return renumbered[(renumbered >= 0).all(axis=1)]


def decoder_layers(model: Any) -> Any:
    """Returns the layers; every layer has `mlp.down_proj` and `self_attn.o_proj`. Raises `UnsupportedArchitecture`."""
    import torch

    layers = getattr(model.get_decoder(), "layers", None)
    parts = ("mlp.down_proj", "self_attn.o_proj")
    names = {name for layer in layers or () for name, _ in layer.named_modules()}
    if not isinstance(layers, torch.nn.ModuleList) or not names.issuperset(parts):
        raise UnsupportedArchitecture(
            f"{type(model).__name__} is not a sequence of layers with {' and '.join(parts)}",
            fix="Leave pruning, sparsity and distillation out of the recipe.",
        )
    return layers


class Walk:
    """Runs a model layer by layer; `hidden` are the hidden states [windows, positions, hidden size] before a layer."""

    def __init__(self, model: Any, tokens: Tokens) -> None:
        import torch

        self._calls: list[Mapping[str, Any]] = []
        batches = torch.split(torch.from_numpy(tokens), _BATCH)
        self._enter(model, batches[0][:1])
        calls = self._calls  # recorded with one window, so that they fit batches of any size
        self.hidden = torch.cat([self._enter(model, batch) for batch in batches])
        self._calls = calls[: len(decoder_layers(model))]

    def _enter(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the input of the first layer, without running any layer. Records the arguments of each layer."""
        import torch

        entered: list[torch.Tensor] = []

        def record(hidden: torch.Tensor, **call: Any) -> torch.Tensor:
            entered.append(hidden)
            self._calls.append(call)
            return hidden

        layers = list(decoder_layers(model))
        for layer in layers:
            layer.forward = record
        try:
            with torch.no_grad():
                model.get_decoder()(input_ids=tokens, use_cache=False)
        finally:
            for layer in layers:
                del layer.forward
        return entered[0]

    def through(self, layer: torch.nn.Module, number: int) -> torch.Tensor:
        """Returns the output of `layer`, the model's `number`th, for `hidden`; does not change `hidden`."""
        import torch

        with torch.no_grad():
            return torch.cat([layer(batch, **self._calls[number]) for batch in torch.split(self.hidden, _BATCH)])

    def normal(
        self, layer: Any, number: int, linear: torch.nn.Linear, target: torch.Tensor | None = None
    ) -> NormalEquations:
        """Returns the normal equations for fitting `linear`, a part of `layer`.

        The wanted output is the current output. If `target` gives the wanted hidden states after the layer, the
        difference between `target` and the current hidden states is added. A layer that normalizes its output before
        adding it (Gemma) is not corrected in this way, because the problem would not be linear.
        """
        import torch

        corrected = target is not None and not hasattr(layer, "post_feedforward_layernorm")
        normal = NormalEquations(linear)
        hook = linear.register_forward_hook(normal.see)
        try:
            with torch.no_grad():
                for start in range(0, len(self.hidden), _BATCH):
                    batch = slice(start, start + _BATCH)
                    after = layer(self.hidden[batch], **self._calls[number])
                    normal.add(target[batch] - after if corrected and target is not None else None)
        finally:
            hook.remove()
        return normal

    def lengths(self, layer: torch.nn.Module, number: int) -> dict[str, torch.Tensor]:
        """Returns for every linear part of `layer`, by name, the norm of each input over all tokens, ‖X_j‖ [inputs]."""
        import torch

        squares = {n: torch.zeros(m.in_features) for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}

        def see(name: str, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
            squares[name] += inputs[0].flatten(0, 1).square().sum(0)

        hooks = [layer.get_submodule(name).register_forward_hook(partial(see, name)) for name in squares]
        try:
            self.through(layer, number)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: total.sqrt() for name, total in squares.items()}


class NormalEquations:
    """The normal equations of a linear layer without its bias.

    `gram` = XᵀX [inputs, inputs], `cross` = XᵀY [inputs, outputs], float64.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        import torch

        self.gram = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
        self.cross = torch.zeros(linear.in_features, linear.out_features, dtype=torch.float64)

    def see(self, linear: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> None:
        self._inputs = inputs[0].flatten(0, 1)
        self._wanted = outputs.flatten(0, 1) - (0 if linear.bias is None else linear.bias)

    def add(self, lacking: torch.Tensor | None) -> None:
        wanted = self._wanted if lacking is None else self._wanted + lacking.flatten(0, 1)
        self.gram += self._inputs.T @ self._inputs
        self.cross += self._inputs.T @ wanted


def keep_inputs(linear: torch.nn.Linear, kept: torch.Tensor) -> None:
    import torch

    linear.weight = torch.nn.Parameter(linear.weight.data[:, kept].contiguous())
    linear.in_features = len(kept)


def keep_outputs(linear: torch.nn.Linear, kept: torch.Tensor) -> None:
    import torch

    linear.weight = torch.nn.Parameter(linear.weight.data[kept].contiguous())
    linear.out_features = len(kept)
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(linear.bias.data[kept].contiguous())


def least_needed(linear: torch.nn.Linear, normal: NormalEquations, width: int, drop: int) -> torch.Tensor:
    """Returns the inputs [kept] that remain after dropping `drop` groups of `width` neighbouring inputs.

    Greedy: each step drops the groups that change the output least when all other weights adapt. This is the optimal
    brain surgeon (Hassibi & Stork 1993) on columns, as in SlimGPT (Ling et al. 2024): the error of dropping a group g
    of `W` is tr(W_g (H⁻¹_gg)⁻¹ W_gᵀ) with H = XᵀX.
    """
    import torch

    weight, inverse = linear.weight.data.double(), torch.linalg.inv(normal.gram + _ridge(normal.gram))
    groups = torch.arange(linear.in_features).view(-1, width)
    alive = torch.ones(len(groups), dtype=torch.bool)
    step = max(1, round(len(groups) * _DROP_STEP))
    for left in range(drop, 0, -step):
        blocks = inverse[groups[:, :, None], groups[:, None, :]]
        blocks = torch.linalg.inv(blocks + torch.eye(width, dtype=torch.float64) * ~alive[:, None, None])
        parts = weight[:, groups].transpose(0, 1)  # [groups, outputs, width]
        errors = ((parts @ blocks) * parts).sum((1, 2)).masked_fill(~alive, torch.inf)
        gone = errors.argsort(stable=True)[: min(step, left)]
        alive[gone] = False
        columns = groups[gone].flatten()
        spread = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        weight -= weight[:, columns] @ spread
        inverse -= inverse[:, columns] @ spread
        weight[:, columns], inverse[columns], inverse[:, columns] = 0, 0, 0
    return groups[alive].flatten()


def refit(linear: torch.nn.Linear, normal: NormalEquations, kept: torch.Tensor | None = None) -> None:
    """Sets the weight to the least-squares solution for the inputs `kept`, with a ridge towards the current weight."""
    import torch

    gram, cross, weight = normal.gram, normal.cross, linear.weight.data
    if kept is not None:
        keep_inputs(linear, kept)
        gram, cross, weight = gram[kept][:, kept], cross[kept], linear.weight.data
    missing = cross - gram @ weight.T.double()
    weight += torch.linalg.solve(gram + _ridge(gram), missing).T.float()


def _ridge(gram: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.eye(len(gram), dtype=torch.float64) * gram.diagonal().mean() * _RIDGE
