"""Quantization grids: one scale and one zero per block of a row, chosen for the smallest rounding error.

The last block of a row may be shorter than the others. It is computed as if zeros followed, which are on every grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

_LEAST = 2.0**-20  # a float16 scale that is not zero
_SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75)  # clipping a block's extremes may reduce the total error


class Grid(NamedTuple):
    """The grid of a matrix: `scales` = `scale_codes` · `steps`. `scale_codes` and `zeros` are float32 [rows, blocks],
    `steps` float32 [rows].

    `zeros` are integers. `scale_codes` are integers up to 255 and `steps` have float16 precision; or `scale_codes` have
    float16 precision and `steps` are ones. `block` is the number of weights in a block.
    """

    scale_codes: torch.Tensor
    steps: torch.Tensor
    zeros: torch.Tensor
    bits: int
    block: int

    @property
    def scales(self) -> torch.Tensor:
        return self.scale_codes * self.steps[:, None]

    @property
    def top(self) -> int:
        return int(2**self.bits - 1)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the nearest codes of `weight` [rows, columns]: integers from 0 to `top`, as float32."""
        steps = in_blocks(weight, self.block) / self.scales[..., None]
        return (steps.round() + self.zeros[..., None]).clamp(0, self.top).flatten(1)[:, : weight.shape[1]]

    def weights(self, codes: torch.Tensor) -> torch.Tensor:
        blocks = in_blocks(codes, self.block)
        return ((blocks - self.zeros[..., None]) * self.scales[..., None]).flatten(1)[:, : codes.shape[1]]

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return self.weights(self.codes(weight))


def in_blocks(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """Returns `matrix` [rows, columns] as [rows, blocks, block], the last block filled up with zeros."""
    import torch

    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % block))
    return padded.reshape(matrix.shape[0], -1, block)


def fit(
    weight: torch.Tensor,
    bits: int,
    block: int,
    *,
    scale_bits: int = 16,
    symmetric: bool = False,
    search: bool = True,
    importance: torch.Tensor | None = None,
) -> Grid:
    """Returns the grid of `weight` [rows, columns] with the least squared error, weighted by `importance` [columns].

    Without `search` the grid spans each block's extremes (plain rounding to nearest). 8-bit scales are multiples of
    1/255 of the largest scale of their row.
    """
    import torch

    blocks = in_blocks(weight, block)
    share = None if importance is None else in_blocks(importance[None], block)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    kinds = (True,) if symmetric else (False, True) if search else (False,)
    steps = _steps(torch.stack([_span(low, high, bits, balanced=kind) for kind in kinds]), scale_bits)
    best = Grid(torch.ones_like(low), steps, torch.zeros_like(low), bits, block)
    least = torch.full_like(low, torch.inf)
    for shrink in _SHRINKS if search else _SHRINKS[:1]:
        for balanced in kinds:
            span = _span(low, high, bits, balanced=balanced) * shrink
            codes = (span / steps[:, None]).half().float() if scale_bits == 16 else _whole(span / steps[:, None], bits)
            scale = (codes * steps[:, None]).clamp(min=_LEAST)
            middle = torch.full_like(scale, 2.0 ** (bits - 1))
            zero = middle if balanced else (-low * shrink / scale).round().clamp(0, best.top)
            lost = _lost(blocks, scale, zero, best.top)
            error = (lost if share is None else lost * share).sum(-1)
            worse = error >= least
            least = least.where(worse, error)
            best = best._replace(
                scale_codes=best.scale_codes.where(worse, codes.clamp(min=_LEAST)), zeros=best.zeros.where(worse, zero)
            )
    return best


def _span(low: torch.Tensor, high: torch.Tensor, bits: int, *, balanced: bool) -> torch.Tensor:
    """Returns the scale with which the grid covers both extremes of every block."""
    import torch

    if balanced:
        return torch.maximum(-low, high) / float(2 ** (bits - 1) - 1)
    return (high - low) / float(2**bits - 1)


def _steps(spans: torch.Tensor, scale_bits: int) -> torch.Tensor:
    """Returns for each row the unit of its scales, such that the largest scale has the largest code.

    `spans` are [kinds, rows, blocks].
    """
    import torch

    largest = spans.amax(dim=(0, 2))
    if scale_bits == 16:
        return torch.ones_like(largest)
    halves = (largest / 255).clamp(min=_LEAST).half()
    next_up = torch.nextafter(halves, torch.ones_like(halves))
    steps: torch.Tensor = torch.where(halves.float() * 255 < largest, next_up, halves).float()
    return steps


def _whole(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounds scale codes to integers.

    With 8-bit weights it rounds up, because clipping a block's extreme costs more than a slightly coarser grid.
    """
    return (codes.ceil() if bits == 8 else codes.round()).clamp(1, 255)


def _lost(blocks: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    codes = (blocks / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, top)
    return codes.sub_(zero[..., None]).mul_(scale[..., None]).sub_(blocks).square_()
