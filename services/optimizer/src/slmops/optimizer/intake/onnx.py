"""Converts an onnxruntime-genai folder back to a Hugging Face directory, by the names that the builder gives to nodes.

The result is compared with the graph: if their logits differ, the model is refused, so that no mistake goes unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.contracts.errors import UnsupportedArchitecture
from slmops.optimizer.intake import angles
from slmops.optimizer.intake.constants import Matrix, NotConstant, constant, embedding, matrix
from slmops.optimizer.intake.export import MAX_PARITY_KL, parity
from slmops.optimizer.intake.huggingface import write_tensors

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_ROUNDED_KL = 0.05
"""Allowed divergence from the graph in nats per token, if the graph rounds activations to int8 or float16."""
_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
_MATRICES = ("MatMul", "MatMulNBits")


def write(folder: Path, target: Path) -> None:
    """Converts a folder. Raises `InvalidModel`, and `UnsupportedArchitecture` for a graph with an unknown structure."""
    from transformers import AutoTokenizer

    decoder = _Decoder(folder)
    try:
        tensors = dict(decoder.tensors())
        config = decoder.config(tensors)
    except NotConstant as error:
        raise decoder.unreadable(f"{error} is not a constant") from error
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    write_tensors(config, tensors, tokenizer, target)
    kl, limit = parity(target, folder).kl, MAX_PARITY_KL if decoder.exact else MAX_ROUNDED_KL
    if not kl <= limit:
        raise decoder.unreadable(f"the result differs from the graph, KL {kl:.2g} > {limit:g}")


class _Decoder:
    """The graph of a decoder, addressed by module: `layers.0/attn/o_proj`. Its methods raise `NotConstant`."""

    def __init__(self, folder: Path) -> None:
        import onnx_ir as ir

        self.folder = folder
        self.declared: Mapping[str, Any] = json.loads((folder / "genai_config.json").read_bytes())["model"]
        self.layers: int = self.declared["decoder"]["num_hidden_layers"]
        self.nodes: dict[str, list[ir.Node]] = {}
        for node in ir.load(folder / self.declared["decoder"]["filename"]).graph:
            self.nodes.setdefault((node.name or "").strip("/").removeprefix("model/").rpartition("/")[0], []).append(
                node
            )

    def unreadable(self, what: str) -> UnsupportedArchitecture:
        return UnsupportedArchitecture(
            f"cannot convert the graph back: {what}",
            where=str(self.folder),
            fix="Push the Hugging Face directory or the GGUF file from which it was made.",
        )

    @property
    def exact(self) -> bool:
        """Whether the graph computes in float32 throughout."""
        kinds = {node.op_type for nodes in self.nodes.values() for node in nodes}
        weight = constant(self.node(f"layers.{self.layers}/final_norm_layernorm", _NORMS).inputs[2])
        return "MatMulNBits" not in kinds and weight.dtype == np.float32

    def node(self, module: str, kinds: tuple[str, ...]) -> ir.Node:
        """Returns the node of a module. Raises `UnsupportedArchitecture` if `module` has no such node."""
        for node in self.nodes.get(module, []):
            if node.op_type in kinds:
                return node
        raise self.unreadable(f"{module} has no {' or '.join(kinds)}")

    def tensors(self) -> Iterator[tuple[str, Matrix]]:
        """Yields the parameters by their Hugging Face names, without a head that equals the embedding."""
        words = embedding(self.node("embed_tokens", ("Gather", "GatherBlockQuantized")))
        head = matrix(self.node("lm_head", _MATRICES))
        yield "model.embed_tokens.weight", words
        if words.shape != head.shape or not np.array_equal(words, head):
            yield "lm_head.weight", head
        yield "model.norm.weight", self.norm(f"layers.{self.layers}/final_norm_layernorm")
        for layer in range(self.layers):
            for name, found in self.layer(f"layers.{layer}"):
                yield f"model.layers.{layer}.{name}", found

    def layer(self, here: str) -> Iterator[tuple[str, Matrix]]:
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}.weight", self.norm(f"{here}/{name}")
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield from self.linear(f"{here}/mlp/{name}", f"mlp.{name}")
        yield from self.linear(f"{here}/attn/o_proj", "self_attn.o_proj")
        if f"{here}/attn/qkv_proj" in self.nodes:
            yield from self.packed(f"{here}/attn/qkv_proj")
        else:
            for x in "qkv":
                yield from self.linear(f"{here}/attn/{x}_proj", f"self_attn.{x}_proj")
        for name in ("q_norm", "k_norm"):
            if f"{here}/attn/{name}" in self.nodes:
                yield f"self_attn.{name}.weight", self.norm(f"{here}/attn/{name}")

    def packed(self, module: str) -> Iterator[tuple[str, Matrix]]:
        """Yields queries, keys and values from one packed matrix."""
        size, heads, kv = (
            self.declared["decoder"][f"{x}"] for x in ("head_size", "num_attention_heads", "num_key_value_heads")
        )
        for name, found in self.linear(module, ""):
            rows = np.split(found, [heads * size, (heads + kv) * size])
            yield from ((f"self_attn.{x}_proj{name}", some) for x, some in zip("qkv", rows, strict=True))

    def linear(self, module: str, name: str) -> Iterator[tuple[str, Matrix]]:
        node = self.node(module, _MATRICES)
        yield f"{name}.weight", matrix(node)
        added = [x for add in self.nodes[module] if add.op_type == "Add" for x in add.inputs if x not in node.outputs]
        biases = [*added, *node.inputs[5:6]] if node.op_type == "MatMulNBits" else added
        if biases:
            yield f"{name}.bias", constant(biases[0]).astype(np.float32)

    def norm(self, module: str) -> Matrix:
        node = self.node(module, _NORMS)
        return constant(node.inputs[1 if node.op_type == _NORMS[0] else 2]).astype(np.float32)

    def config(self, tensors: Mapping[str, Matrix]) -> Any:
        from transformers import CONFIG_MAPPING

        decoder, declared = self.declared["decoder"], self.declared
        epsilon = self.node("layers.0/input_layernorm", _NORMS).attributes["epsilon"].as_float()
        settings = {
            "hidden_size": decoder["hidden_size"],
            "intermediate_size": len(tensors["model.layers.0.mlp.up_proj.weight"]),
            "num_hidden_layers": self.layers,
            "num_attention_heads": decoder["num_attention_heads"],
            "num_key_value_heads": decoder["num_key_value_heads"],
            "head_dim": decoder["head_size"],
            "vocab_size": len(tensors["model.embed_tokens.weight"]),
            "max_position_embeddings": declared["context_length"],
            "rms_norm_eps": float(f"{epsilon:.6g}"),  # 1e-6 was written as float32
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in tensors,
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "rope_parameters": self.rope(),
            **{key: declared.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }
        return CONFIG_MAPPING[declared["type"]](**settings)

    def rope(self) -> dict[str, Any]:
        """Reads the rotary parameters from the cosine and sine tables. Raises `UnsupportedArchitecture`."""
        attention = self.node("layers.0/attn", ("GroupQueryAttention",))
        cosines, sines = (constant(value) for value in attention.inputs[7:9])
        if 2 * cosines.shape[1] != self.declared["decoder"]["head_size"]:
            raise self.unreadable(f"the rotary embedding covers only {2 * cosines.shape[1]} values of a head")
        if any(node.attributes["local_window_size"].as_int() != -1 for node in self.attentions()):
            raise self.unreadable("sliding attention is not supported")
        return angles.of_table(cosines, sines)

    def attentions(self) -> Iterator[ir.Node]:
        return (self.node(f"layers.{layer}/attn", ("GroupQueryAttention",)) for layer in range(self.layers))
