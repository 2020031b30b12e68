"""Quantizes a new version on its predecessor's grids, changing as few codes of the predecessor's variant as possible.

If a fine-tuned version is quantized on new grids, all its scales differ although its weights hardly changed, and the
update must contain all of them. On the predecessor's grids, scales and zeros stay, and so does every code that is still
close to its weight. The update then contains about one code in two hundred (`slmops.kit.delta`). The loss of quality is
measured and judged as for every variant.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import Field

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import OptimizationFailed
from slmops.optimizer.passes import Context, Params
from slmops.optimizer.passes.pack import is_rotation, to_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

_MODEL = "model.onnx"
_CODED = re.compile(r"(?P<matrix>.+)_(Q[48]|q(?P<part>\d*)_codes)")
"""The names that the builder and `pack` give to the codes of a matrix of the float graph, or of a part of its rows."""


class Anchor(Params):
    predecessor: Digest = Field(description="Digest of the variant whose grids are kept; the job downloads its files")
    keep: float = Field(
        default=0.5,
        ge=0.5,
        le=2,
        description="A code stays if its weight is within this many steps of it; 0.5 rounds to the nearest. Larger "
        "values lose what the version learned: 1.5 lost half of it in 8-bit matrices, the sensitive ones",
    )
    keep_embedding: float = Field(
        default=1.5,
        ge=0.5,
        le=8,
        description="The same for an 8-bit embedding, whose steps are fine and whose codes are half of an update",
    )

    max_changed: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Share of codes that may change; a version that changes more is not an update of its predecessor",
    )

    @property
    def calibrated(self) -> bool:
        return False


def run(given: Path, out: Path, params: Anchor, context: Context) -> None:
    """Runs the pass.

    Raises `OptimizationFailed` if the predecessor is missing, has another architecture or differs too much.
    """
    import onnx_ir as ir

    before = context.predecessor
    if before is None or not (before / _MODEL).is_file():
        raise OptimizationFailed(
            f"the predecessor {params.predecessor} is missing", fix="Use a recipe without anchor for a first version."
        )
    context.tell("exporting the graph", 0.0)
    exported = context.export(given)
    context.tell("anchoring", 0.5)
    model = ir.load(before / _MODEL)
    _Anchoring(model, ir.load(exported / _MODEL), params).replace_all()
    shutil.copytree(exported, out, ignore=shutil.ignore_patterns(f"{_MODEL}*"))
    for path in ("genai_config.json", "tokenizer.json"):  # keep the predecessor's bytes if the content is the same
        if (before / path).is_file() and _same_json(before / path, out / path):
            shutil.copyfile(before / path, out / path)
    ir.save(model, out / _MODEL, external_data=f"{_MODEL}.data")


@dataclass(frozen=True)
class _Coded:
    """The codes of consecutive rows of a matrix, as initializers of the predecessor's graph."""

    codes: ir.Value
    part: int
    bits: int

    @property
    def matrix(self) -> str:
        found = _CODED.fullmatch(self.codes.name or "")
        assert found
        return found["matrix"]


class _Anchoring:
    """Replaces the values of the predecessor's graph `before` by those of the new version's float graph `after`."""

    def __init__(self, before: ir.Model, after: ir.Model, params: Anchor) -> None:
        self._before, self._after = before.graph.initializers, after.graph.initializers
        self._params = params
        self._codes = self._changed = 0
        self._coded = list(_coded(before.graph))
        self._by_row = {node.inputs[0].name for node in after.graph if node.op_type == "Gather" and node.inputs[0]}
        self._embeddings = self._by_row | {  # tied to the head, which is transposed
            node.inputs[0].name for node in after.graph if node.op_type == "Transpose" and node.inputs[0]
        }

    def replace_all(self) -> None:
        done = set()
        for matrix in dict.fromkeys(coded.matrix for coded in self._coded):
            self._matrix(matrix, sorted((c for c in self._coded if c.matrix == matrix), key=lambda c: c.part))
            done.add(matrix)
        self._check_near()
        for name, value in self._after.items():
            if name not in done and not is_rotation(name):
                self._plain(name, value)

    def _check_near(self) -> None:
        if (share := self._changed / max(self._codes, 1)) > self._params.max_changed:
            raise OptimizationFailed(
                f"{share:.0%} of the codes would change: the version is not a small update of its predecessor",
                fix="Use a recipe without anchor, or raise max_changed.",
            )

    def _matrix(self, name: str, parts: list[_Coded]) -> None:
        values = self._after.get(name)
        if values is None or values.const_value is None:
            raise _different(f"the new version has no matrix {name}")
        weights = values.const_value.numpy()
        rows = weights if name in self._by_row else np.ascontiguousarray(weights.T)
        start = 0
        for part in parts:
            start += self._part(part, rows[start:])
        if start != rows.shape[0]:
            raise _different(f"its matrix {name} has {start} rows, the new version's {rows.shape[0]}")

    def _part(self, part: _Coded, rows: npt.NDArray[np.float32]) -> int:
        """Replaces the codes of the first rows of `rows`; returns the number of these rows."""
        old, scales, zeros = self._grid(part)
        count, columns = old.shape
        filling = columns - rows.shape[1]  # of the last block of a row
        if rows.shape[0] < count or not 0 <= filling < columns // scales.shape[1]:
            raise _different(
                f"its matrix {part.matrix} has rows of {columns} values, the new version's {rows.shape[1]}"
            )
        blocks = np.pad(rows[:count], ((0, 0), (0, filling))).reshape(count, scales.shape[1], -1)
        steps = blocks / np.where(scales == 0, 1, scales)[..., None] + zeros[..., None]
        nearest = np.clip(np.rint(steps), 0, 2**part.bits - 1).reshape(count, columns).astype(np.uint8)
        loose = part.bits == 8 and part.matrix in self._embeddings
        within = self._params.keep_embedding if loose else self._params.keep
        near = np.abs(steps.reshape(count, columns) - old) <= within
        kept = np.where(near, old, nearest)
        self._codes += old.size
        self._changed += int(np.count_nonzero(kept != old))
        _replace(part.codes, to_bytes(kept, part.bits).reshape(self._array(part.codes.name or "").shape))
        return int(count)

    def _grid(self, part: _Coded) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Returns codes [rows, columns], with what fills up the last block, scales and zeros [rows, blocks]."""
        stem = (part.codes.name or "").removesuffix("_codes")
        raw = self._array(part.codes.name or "")
        rows = raw.shape[0]
        scales = self._scales(stem, part.matrix).reshape(rows, -1)
        zeros = self._zeros(stem, part, scales.shape)
        return _unpacked(raw.reshape(rows, -1), part.bits), scales, zeros

    def _scales(self, stem: str, matrix: str) -> npt.NDArray[np.float32]:
        if f"{stem}_scales_narrow" not in self._before:
            return self._array(f"{matrix}_scales").astype(np.float32)
        narrow = self._array(f"{stem}_scales_narrow").astype(np.float32)
        steps = f"{stem}_scales_steps_narrow"
        return narrow * self._array(steps).astype(np.float32) if steps in self._before else narrow

    def _zeros(self, stem: str, part: _Coded, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        found = next((n for n in (f"{stem}_zeros", f"{part.matrix}_zero_points") if n in self._before), None)
        if found is None:
            return np.full(shape, 2.0 ** (part.bits - 1), np.float32)
        unpacked = _unpacked(self._array(found).reshape(shape[0], -1), part.bits)
        return unpacked[:, : shape[1]].astype(np.float32)

    def _array(self, name: str) -> npt.NDArray[np.generic]:
        value = self._before.get(name)
        if value is None or value.const_value is None:
            raise _different(f"it has no {name}")
        return value.const_value.numpy()

    def _plain(self, name: str, value: ir.Value) -> None:
        """Replaces a float tensor, such as a norm or a bias."""
        old = self._before.get(name)
        if old is None or old.const_value is None or value.const_value is None:
            raise _different(f"it has no {name}")
        if old.const_value.shape != value.const_value.shape or old.const_value.dtype != value.const_value.dtype:
            raise _different(f"its {name} has another shape or type")
        _replace(old, value.const_value.numpy())


def _coded(graph: ir.Graph) -> Iterator[_Coded]:
    seen: set[str] = set()
    for node in graph:
        position = {"MatMulNBits": 1, "GatherBlockQuantized": 0}.get(node.op_type)
        value = node.inputs[position] if position is not None else None
        if value is not None and (producer := value.producer()) is not None:  # an embedding, reshaped
            value = producer.inputs[0]
        if value is None or value.name is None or value.name in seen:
            continue
        seen.add(value.name)
        if not (found := _CODED.fullmatch(value.name)):
            raise _different(f"its codes have an unknown name {value.name}")
        yield _Coded(value, int(found["part"] or 0), node.attributes["bits"].as_int())


def _replace(value: ir.Value, data: npt.NDArray[np.generic]) -> None:
    import onnx_ir as ir

    value.const_value = ir.tensor(np.ascontiguousarray(data), name=value.name)


def _unpacked(data: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.uint8]:
    values = data.astype(np.uint8, copy=False)
    if bits == 8:
        return values
    return np.stack([values & 0x0F, values >> 4], axis=-1).reshape(values.shape[0], -1)


def _same_json(before: Path, after: Path) -> bool:
    import json

    try:
        found: tuple[Mapping[str, object], Mapping[str, object]] = (
            json.loads(before.read_bytes()),
            json.loads(after.read_bytes()),
        )
    except (OSError, ValueError):
        return False
    return found[0] == found[1]


def _different(why: str) -> OptimizationFailed:
    return OptimizationFailed(
        f"the predecessor has a different structure: {why}",
        fix="Use a recipe without anchor; the update will be larger.",
    )
