"""Accesses the decoder of a Hugging Face model for quantization: its layers, and their linear projections by input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BATCH = 4  # windows; larger batches are not faster on a CPU, and take memory


@dataclass(frozen=True)
class Projections:
    """The linear modules of one layer that read the same input, by parameter name of their weight."""

    modules: dict[str, torch.nn.Linear]

    @property
    def columns(self) -> int:
        return next(iter(self.modules.values())).in_features


def load(folder: Path) -> Any:
    """Loads a model in float32 for evaluation, without gradients."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False)


def layers(model: Any) -> Any:
    """Returns the decoder's layers in order."""
    return model.get_decoder().layers


def projections(model: Any, number: int, run: Callable[[], object]) -> list[Projections]:
    """Returns the projections of layer `number` in the order in which they run; `run` must run the layer once."""
    import torch

    layer = layers(model)[number]
    names = {module: name for name, module in model.named_modules()}
    seen: list[tuple[torch.Tensor, dict[str, torch.nn.Linear]]] = []

    def record(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        group = next((group for tensor, group in seen if tensor is inputs[0]), None)
        if group is None:
            seen.append((inputs[0], group := {}))
        group[f"{names[module]}.weight"] = module

    with hooked([m for m in layer.modules() if isinstance(m, torch.nn.Linear)], record):
        run()
    return [Projections(group) for _, group in seen]


@contextmanager
def hooked(modules: list[Any], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LayerInputs:
    """Records the arguments of each layer, so that layers can be run one by one.

    `hidden` are the inputs of the next layer, one tensor [windows, positions, hidden] per batch.
    """

    def __init__(self, model: Any, tokens: torch.Tensor) -> None:
        import torch

        self._layers = layers(model)
        self._keywords: list[list[dict[str, Any]]] = [[] for _ in self._layers]
        self.hidden: list[torch.Tensor] = []
        numbers = {layer: number for number, layer in enumerate(self._layers)}

        def record(layer: Any, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            arguments = dict(keywords)
            hidden = positional[0] if positional else arguments.pop("hidden_states")
            if numbers[layer] == 0:
                self.hidden.append(hidden)
            self._keywords[numbers[layer]].append(arguments)

        handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self._layers]
        try:
            for batch in torch.split(tokens, BATCH):
                model.get_decoder()(batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def run(self, number: int, *, first: bool = False) -> list[torch.Tensor]:
        """Returns the outputs of layer `number` for `hidden`, or only for its first batch."""
        batches = list(zip(self.hidden, self._keywords[number], strict=True))[: 1 if first else None]
        outputs = (self._layers[number](hidden, **keywords) for hidden, keywords in batches)
        return [output[0] if isinstance(output, tuple) else output for output in outputs]
