"""Rounds a matrix with error compensation: GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323).

Columns are rounded one after the other, in the order of their inputs' energy. The error of each column is compensated
in the columns that are not rounded yet, using the second moment of the matrix's inputs. The grid is fixed beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmops.optimizer.weights.grid import Grid

if TYPE_CHECKING:
    import torch

_CHUNK = 128  # columns whose updates are collected and applied to the other columns in one matrix product


def gptq(weight: torch.Tensor, moment: torch.Tensor, grid: Grid, damping: float) -> torch.Tensor:
    """Returns codes [rows, columns] for `weight` on `grid`.

    `moment` [columns, columns] is the mean of x xᵀ over inputs x. `damping` times its mean diagonal is added to its
    diagonal so that it can be inverted.
    """
    import torch

    rows, columns = weight.shape
    order = torch.argsort(moment.diagonal(), descending=True)
    left = weight[:, order].clone()
    root = _inverse_root(moment[order][:, order], damping)
    scales, zeros = (
        grid.scales[:, order // grid.block].T.contiguous(),
        grid.zeros[:, order // grid.block].T.contiguous(),
    )
    found = torch.empty(columns, rows)
    for start in range(0, columns, _CHUNK):
        stop = min(start + _CHUNK, columns)
        here, corner = left[:, start:stop].T.contiguous(), root[start:stop, start:stop]
        errors = torch.empty_like(here)
        for at in range(stop - start):
            scale, zero, column = scales[start + at], zeros[start + at], here[at]
            code = (column / scale).round_().add_(zero).clamp_(0, grid.top)
            found[start + at] = code
            errors[at] = (column - (code - zero) * scale) / corner[at, at]
            here[at + 1 :].addr_(corner[at, at + 1 :], errors[at], alpha=-1)
        left[:, stop:].addmm_(errors.T, root[start:stop, stop:], alpha=-1)
    codes = torch.empty(rows, columns)
    codes[:, order] = found.T
    return codes


def _inverse_root(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Returns the upper Cholesky factor of the damped inverse. An input that is always zero gets a diagonal of one."""
    import torch

    damped = moment.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    root: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root
