"""Estimates the sensitivity of each projection from gradients of the model's own predictions (Fisher information).

For a small change δW of one matrix, KL(model ‖ changed model) ≈ ½ · E[(g · δW x)²], summed over positions. Here g is
the gradient of log p(y) with respect to the matrix's output, and y is drawn from the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from slmops.optimizer.weights.decoder import BATCH

if TYPE_CHECKING:
    import torch

Energies = Mapping[str, "torch.Tensor"]
"""Parameter name → ‖g‖² at each calibration position, [windows, positions]."""


def measure(
    model: Any,
    modules: Mapping[str, torch.nn.Linear],
    rounded: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    expecting: int,
    seed: int,
    tell: Callable[[float], None],
) -> tuple[Energies, dict[str, float]]:
    """Returns gradient energies, and for each matrix the divergence to expect if only that matrix is `rounded`.

    Divergences are in nats per position. `modules` are by parameter name, `tokens` are [windows, positions]. The
    divergence is estimated only on the first `expecting` windows, because rounding every matrix for each batch takes as
    long as the gradients.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    energies: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    expected = dict.fromkeys(modules, 0.0)

    def watch(name: str, module: torch.nn.Linear) -> Any:
        def forward(_: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            moved = None
            if sum(map(len, energies[name])) < expecting:
                # Not kept: the changes of all matrices would take the memory of a second model.
                change = rounded(module.weight) - module.weight
                moved = torch.nn.functional.linear(inputs[0].detach(), change)

            def backward(gradient: torch.Tensor) -> None:
                energies[name].append(gradient.square().sum(-1))
                if moved is not None:
                    expected[name] += float((gradient * moved).sum(-1).square().sum()) / 2

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return module.register_forward_hook(forward)

    handles = [watch(name, module) for name, module in modules.items()]
    try:
        for number, batch in enumerate(torch.split(tokens, BATCH)):
            embedded = model.get_input_embeddings()(batch).requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            torch.nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum").backward()  # type: ignore[no-untyped-call]
            tell((number + 1) * BATCH / len(tokens))
    finally:
        for handle in handles:
            handle.remove()
    positions = tokens[:expecting].numel()
    return {n: torch.cat(e) for n, e in energies.items()}, {n: value / positions for n, value in expected.items()}
