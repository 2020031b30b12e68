"""Runs a decoder's graph directly, without generation or cache, for evaluations and parity checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import OptimizationFailed
from slmops.contracts.manifest import ADAPTER_PATH

if TYPE_CHECKING:
    import onnxruntime as ort

_CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_RING = "past_sliding_length"  # the builder's name of a dimension whose buffer must hold a whole window


class Graph:
    """The decoder of a genai folder: maps tokens [positions] of one window to float32 logits [positions, vocabulary].

    Raises `OptimizationFailed` if the graph does not load or does not run.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime as ort

        self._folder = folder
        options = ort.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # like OMP_WAIT_POLICY in the job
        options.log_severity_level = 3  # the runtime warns about every adapter input
        try:
            decoder = json.loads((folder / "genai_config.json").read_bytes())["model"]["decoder"]
            self._session = ort.InferenceSession(folder / decoder["filename"], options, ["CPUExecutionProvider"])
            self._run = ort.RunOptions()
            if (folder / ADAPTER_PATH).exists():
                self._adapter = ort.LoraAdapter()  # must live as long as the options that use it
                self._adapter.Load(str(folder / ADAPTER_PATH))
                self._run.add_active_adapter(self._adapter)
            self._empty = {
                node.name: _empty_cache(node, decoder)
                for node in self._session.get_inputs()
                if node.name.startswith("past_key_values.")
            }
        except Exception as error:  # onnxruntime's errors have no common base class
            raise self._failed("load", error) from error

    def __call__(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        known: dict[str, npt.NDArray[Any]] = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, len(tokens)), dtype=np.int64),
            "position_ids": np.arange(len(tokens), dtype=np.int64)[None],
            **self._empty,
        }
        try:
            feed = {node.name: known[node.name] for node in self._session.get_inputs()}
            logits: npt.NDArray[np.float32] = self._session.run(["logits"], feed, self._run)[0][0]
        except Exception as error:
            raise self._failed("run", error) from error
        return logits.astype(np.float32, copy=False)

    def _failed(self, what: str, error: Exception) -> Exception:
        if isinstance(error, MemoryError | OSError):
            return error  # a problem of the machine, not of the graph
        return OptimizationFailed(
            f"the graph does not {what}: {type(error).__name__}: {str(error)[:300]}",
            where=str(self._folder),
            fix="Use a decoder that the onnxruntime-genai builder made.",
        )


def _empty_cache(node: ort.NodeArg, decoder: dict[str, Any]) -> npt.NDArray[Any]:
    """Returns an empty cache [1, heads, 0, head size], or for a layer with a ring buffer, one for a whole window.

    It uses the sizes that the graph declares, because layers may differ.
    """
    _, heads, length, head_size = node.shape
    capacity = decoder["sliding_window"]["window_size"] if length == _RING else 0
    size = head_size if isinstance(head_size, int) else decoder["head_size"]
    return np.zeros((1, heads, capacity, size), dtype=_CACHE_TYPES[node.type])
