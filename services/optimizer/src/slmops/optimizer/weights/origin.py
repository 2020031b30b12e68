"""Finds from which parameters the rows of a graph's matrices come, by their values, so no table of names is needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from pathlib import Path

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
_CANDIDATES = 64  # positions to try for a row that occurs often, such as the rows of unused tokens


class Rows:
    """Finds where rows come from. If a row occurs several times, the longest run of equal rows wins."""

    def __init__(self, model: Path, names: Container[str]) -> None:
        self._parameters = _parameters(model, names)
        self._places: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for name, matrix in self._parameters.items():
            for row, values in enumerate(matrix):
                self._places[hash(values.tobytes())].append((name, row))

    def origin(self, matrix: Matrix) -> list[tuple[str, int, int]]:
        """Returns (parameter, first row, number of rows) of the runs that form `matrix` [rows, columns].

        Empty if a row is in no parameter.
        """
        found, start = [], 0
        while start < len(matrix):
            runs = [
                (self._run(matrix[start:], name, row), name, row)
                for name, row in self._places[hash(matrix[start].tobytes())][:_CANDIDATES]
            ]
            length, name, row = max(runs, default=(0, "", 0))
            if not length:
                return []
            found.append((name, row, length))
            start += length
        return found

    def _run(self, matrix: Matrix, name: str, row: int) -> int:
        known = self._parameters[name][row : row + len(matrix)]
        if known.shape[1] != matrix.shape[1]:
            return 0
        same = (known == matrix[: len(known)]).all(axis=1)
        return len(same) if same.all() else int(same.argmin())


def _parameters(model: Path, names: Container[str]) -> dict[str, Matrix]:
    from safetensors import safe_open

    found: dict[str, Matrix] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
    return found
