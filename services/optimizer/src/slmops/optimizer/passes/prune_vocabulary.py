"""Drops tokens that the calibration text does not need, from embedding, head and a byte-level BPE tokenizer.

A text whose tokens are all kept is tokenized as before: if a token is kept, so are all tokens from which merges make
it, and merges keep their order. Other text is split into smaller tokens, at worst into bytes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from slmops.contracts.errors import OptimizationFailed, UnsupportedArchitecture
from slmops.optimizer.passes import Context, Params, Tokens, decoder

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_REDUNDANT = ("vocab.json", "merges.txt", "added_tokens.json")  # older files with the content of tokenizer.json


class PruneVocabulary(Params):
    size: int | None = Field(
        default=None,
        ge=1,
        description="Number of tokens to keep: special tokens and single bytes, then the most frequent in the "
        "calibration text, then the first of the tokenizer; null keeps only tokens that occur in the text",
    )


def run(given: Path, out: Path, params: PruneVocabulary, context: Context) -> None:
    """Runs the pass; writes the reference's ids of the kept tokens to `kept_tokens.npy`.

    Raises `UnsupportedArchitecture` for another kind of tokenizer, and `OptimizationFailed` if `size` is too small for
    the tokens that must stay.
    """
    model = decoder.load(given)
    tokenizer = _read(given)
    windows = decoder.calibration(given, context)
    rows = model.get_input_embeddings().weight.shape[0]
    counts = np.bincount(windows.ravel(), minlength=rows)
    configs = [config for config in (model.config, model.generation_config) if config is not None]
    named = {number for config in configs for ids in _token_ids(config).values() for number in _listed(ids)}
    kept = _kept(tokenizer, counts, params.size, {number for number in named if 0 <= number < rows})
    numbers = {int(old): new for new, old in enumerate(kept)}
    _cut(model, kept)
    for config in configs:
        for name, ids in _token_ids(config).items():
            setattr(config, name, _renumbered(ids, numbers))
    out.mkdir()
    (out / _TOKENIZER).write_text(json.dumps(_smaller(tokenizer, numbers), ensure_ascii=False, indent=2), "utf-8")
    _write_config(given, out, numbers)
    before = decoder.kept_tokens(given)
    np.save(out / decoder.KEPT_TOKENS, kept if before is None else before[kept])
    decoder.save(model, given, out, leave_out=_REDUNDANT)


def _read(given: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((given / _TOKENIZER).read_bytes())
    except FileNotFoundError:
        found = {"model": {"type": "without tokenizer.json"}}
    kinds = {part.get("type") for part in _parts(found.get("pre_tokenizer"))}
    if found["model"].get("type") != "BPE" or found["model"].get("byte_fallback") or "ByteLevel" not in kinds:
        raise UnsupportedArchitecture(
            f"the tokenizer is {found['model'].get('type')}, not byte-level BPE",
            where=str(given),
            fix="Leave prune-vocabulary out of the recipe.",
        )
    return found


def _parts(stage: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Returns a stage of a tokenizer and, if it is a sequence, all its parts."""
    if stage is None:
        return []
    inner = [part for key in ("pretokenizers", "processors") for part in stage.get(key, ())]
    return [stage, *(found for part in inner for found in _parts(part))]


def _kept(tokenizer: Mapping[str, Any], counts: Tokens, size: int | None, named: set[int]) -> Tokens:
    """Returns the sorted ids of the tokens to keep; `named` are ids that the model's configuration names."""
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    parts = _made_of(tokenizer)
    must = {number for token, number in vocabulary.items() if len(token) == 1}
    must |= {added["id"] for added in tokenizer["added_tokens"]} | named
    limit = len(counts) if size is None else size
    if len(must) > limit:
        raise OptimizationFailed(
            f"{len(must)} special tokens and bytes must stay, but size is {limit}", fix="Use a larger size."
        )
    order = sorted(vocabulary.values(), key=lambda number: (-counts[number], number))
    for number in order if size is not None else (n for n in order if counts[n]):
        new = _with_parts(number, parts) - must
        if len(must) + len(new) <= limit:
            must |= new
    return np.array(sorted(must), dtype=np.int64)


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the merges as pairs; older files write a pair as one string."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in tokenizer["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _made_of(tokenizer: Mapping[str, Any]) -> dict[int, set[int]]:
    """Returns for every token the tokens from which merges make it."""
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    parts: dict[int, set[int]] = defaultdict(set)
    for left, right in _merges(tokenizer):
        parts[vocabulary[left + right]] |= {vocabulary[left], vocabulary[right]}
    return parts


def _with_parts(number: int, parts: Mapping[int, set[int]]) -> set[int]:
    found, open_ = {number}, [number]
    while open_:
        new = parts.get(open_.pop(), set()) - found
        found |= new
        open_ += new
    return found


def _cut(model: Any, kept: Tokens) -> None:
    import torch

    rows = torch.from_numpy(kept)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight = torch.nn.Parameter(embedding.weight.data[rows].contiguous())
    embedding.num_embeddings = len(kept)
    decoder.keep_outputs(head, rows)
    if tied:
        head.weight = embedding.weight
    model.config.vocab_size = len(kept)


def _token_ids(config: Any) -> dict[str, int | list[int]]:
    """Returns the token ids in a configuration, such as `eos_token_id`."""
    return {k: ids for k, ids in config.to_dict().items() if k.endswith("_token_id") and isinstance(ids, int | list)}


def _listed(ids: int | list[int]) -> list[int]:
    return ids if isinstance(ids, list) else [ids]


def _renumbered(ids: int | list[int], numbers: Mapping[int, int]) -> int | list[int] | None:
    """Returns the new ids; None for an id that is not a token, such as -1."""
    return [numbers[i] for i in ids if i in numbers] if isinstance(ids, list) else numbers.get(ids)


def _smaller(tokenizer: dict[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    model = tokenizer["model"]
    vocabulary = {token: numbers[number] for token, number in model["vocab"].items() if number in numbers}
    merges = [pair for pair in _merges(tokenizer) if {*pair, "".join(pair)} <= vocabulary.keys()]
    added = [token | {"id": numbers[token["id"]]} for token in tokenizer["added_tokens"]]
    for part in _parts(tokenizer.get("post_processor")):
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [numbers[number] for number in special["ids"]]
    return tokenizer | {"added_tokens": added, "model": model | {"vocab": vocabulary, "merges": merges}}


def _write_config(given: Path, out: Path, numbers: Mapping[int, int]) -> None:
    if not (given / _TOKENIZER_CONFIG).exists():
        return
    config = json.loads((given / _TOKENIZER_CONFIG).read_bytes())
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {str(numbers[int(n)]): t for n, t in config["added_tokens_decoder"].items()}
    (out / _TOKENIZER_CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2), "utf-8")
