"""A pruned vocabulary keeps the meaning of the remaining tokens and can still encode every text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from float_models import context, logits, make_model
from transformers import AutoTokenizer, GenerationConfig

from slmops.contracts.errors import OptimizationFailed, UnsupportedArchitecture
from slmops.optimizer.passes import decoder, prune_vocabulary
from slmops.optimizer.passes.prune_vocabulary import PruneVocabulary

KNOWN = "the quick brown fox jumps over the lazy dog"
UNKNOWN = "Größe 日本 \x01 capital of France"


def windows_of(folder: Path, text: str):
    ids = AutoTokenizer.from_pretrained(folder)(text * 40)["input_ids"]
    return np.array(ids[: len(ids) // 32 * 32], dtype=np.int64).reshape(-1, 32)


@pytest.fixture
def given(tmp_path) -> Path:
    make_model(tmp_path / "given")
    return tmp_path / "given"


@pytest.fixture
def known(given):
    return context(given, windows_of(given, KNOWN))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_text_of_kept_tokens_is_tokenized_and_evaluated_as_before(given, known, tmp_path):
    prune_vocabulary.run(given, tmp_path / "out", PruneVocabulary(), known)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (given, tmp_path / "out"))
    assert 256 < len(after) < len(before)
    assert after.tokenize(KNOWN) == before.tokenize(KNOWN)
    kept = np.load(tmp_path / "out" / decoder.KEPT_TOKENS)
    old, new = (np.array([tokenizer(KNOWN)["input_ids"]]) for tokenizer in (before, after))
    np.testing.assert_array_equal(kept[new], old)
    model = decoder.load(tmp_path / "out")
    assert model.config.vocab_size == len(kept) == len(after)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model, new), logits(decoder.load(given), old)[..., kept])


def test_other_text_is_split_into_more_tokens_and_decodes_to_the_same_text(given, known, tmp_path):
    prune_vocabulary.run(given, tmp_path / "out", PruneVocabulary(), known)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (given, tmp_path / "out"))
    assert len(after.tokenize(UNKNOWN)) > len(before.tokenize(UNKNOWN))
    assert after.decode(after(UNKNOWN)["input_ids"]) == UNKNOWN


def test_special_tokens_are_renumbered_in_every_file(given, known, tmp_path):
    edit(given / "config.json", lambda config: config.update(eos_token_id=[300, 2], pad_token_id=-1))
    GenerationConfig(bos_token_id=1, eos_token_id=[300, 2], pad_token_id=300).save_pretrained(given)
    last = {"id": 300, "content": "<|last|>", "special": True, "normalized": False}
    special = {"<|last|>": {"id": "<|last|>", "ids": [300], "tokens": ["<|last|>"]}}
    template = [{"SpecialToken": {"id": "<|last|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": special}

    def end_with_a_special_token(tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        old = next(token for token, number in vocabulary.items() if number == 300)
        tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if old not in (*m, "".join(m))]
        vocabulary["<|last|>"] = vocabulary.pop(old)
        single = {"single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append(last | single)
        tokenizer["post_processor"] = processor

    edit(given / "tokenizer.json", end_with_a_special_token)
    prune_vocabulary.run(given, tmp_path / "out", PruneVocabulary(), known)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    new = tokenizer.convert_tokens_to_ids("<|last|>")
    assert 256 < new < 300
    assert tokenizer(KNOWN)["input_ids"][0] == new
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [new, 2], None)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([new, 2], new)


def test_a_size_is_filled_with_tokens_of_the_text_and_then_with_the_first_tokens(given, known, tmp_path):
    prune_vocabulary.run(given, tmp_path / "out", PruneVocabulary(size=300), known)
    kept = set(np.load(tmp_path / "out" / decoder.KEPT_TOKENS).tolist())
    assert len(kept) == 300
    assert set(known.calibration().ravel().tolist()) < kept
    prune_vocabulary.run(given, tmp_path / "least", PruneVocabulary(), known)
    assert set(np.load(tmp_path / "least" / decoder.KEPT_TOKENS).tolist()) < kept


def test_a_size_too_small_for_bytes_and_special_tokens_is_refused(given, known, tmp_path):
    with pytest.raises(OptimizationFailed, match="259 special tokens and bytes must stay, but size is 200"):
        prune_vocabulary.run(given, tmp_path / "out", PruneVocabulary(size=200), known)


def test_pruning_twice_equals_pruning_once(given, known, tmp_path):
    """Calibration tokens always have the reference's ids; `kept_tokens` composes both prunings."""
    prune_vocabulary.run(given, tmp_path / "once", PruneVocabulary(size=310), known)
    prune_vocabulary.run(tmp_path / "once", tmp_path / "twice", PruneVocabulary(), known)
    prune_vocabulary.run(given, tmp_path / "out", PruneVocabulary(), known)
    for name in ("model.safetensors", "tokenizer.json", decoder.KEPT_TOKENS):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_windows_with_dropped_tokens_are_left_out(given, known, tmp_path):
    prune_vocabulary.run(given, tmp_path / "out", PruneVocabulary(), known)
    both = np.concatenate([known.calibration(), windows_of(given, "what is the capital of France")])
    np.testing.assert_array_equal(
        decoder.calibration(tmp_path / "out", context(given, both)), decoder.calibration(tmp_path / "out", known)
    )
    with pytest.raises(OptimizationFailed, match="covers no window"):
        decoder.calibration(tmp_path / "out", context(given, both[-1:]))


def test_an_untied_head_is_pruned_like_the_embedding(tmp_path):
    model = make_model(tmp_path / "given", "qwen2")
    known = context(tmp_path / "given", windows_of(tmp_path / "given", KNOWN))
    prune_vocabulary.run(tmp_path / "given", tmp_path / "out", PruneVocabulary(), known)
    kept = torch.from_numpy(np.load(tmp_path / "out" / decoder.KEPT_TOKENS))
    found = decoder.load(tmp_path / "out")
    assert torch.equal(found.lm_head.weight, model.lm_head.weight[kept])
    assert torch.equal(found.model.embed_tokens.weight, model.model.embed_tokens.weight[kept])


def test_older_tokenizer_files_are_read_and_not_copied(given, known, tmp_path):
    prune_vocabulary.run(given, tmp_path / "new", PruneVocabulary(), known)

    def as_it_was(tokenizer):
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]

    edit(given / "tokenizer.json", as_it_was)
    edit(given / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"2": {"content": "<|im_end|>"}}))
    for name in ("vocab.json", "merges.txt"):
        (given / name).write_text("{}")
    prune_vocabulary.run(given, tmp_path / "old", PruneVocabulary(), known)
    assert (tmp_path / "old" / "tokenizer.json").read_bytes() == (tmp_path / "new" / "tokenizer.json").read_bytes()
    assert not {"vocab.json", "merges.txt"} & {path.name for path in (tmp_path / "old").iterdir()}
    assert json.loads((tmp_path / "old" / "tokenizer_config.json").read_text())["added_tokens_decoder"].keys() == {"2"}


def test_another_kind_of_tokenizer_is_refused(given, known, tmp_path):
    edit(given / "tokenizer.json", lambda tokenizer: tokenizer["model"].update(byte_fallback=True))
    with pytest.raises(UnsupportedArchitecture, match="not byte-level BPE"):
        prune_vocabulary.run(given, tmp_path / "out", PruneVocabulary(), known)
    (given / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedArchitecture, match=r"without tokenizer\.json"):
        prune_vocabulary.run(given, tmp_path / "out", PruneVocabulary(), known)
