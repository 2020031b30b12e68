"""The evaluation text and the calibration text must not overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slmops.contracts.errors import InvalidMessage, InvalidModel, NotFound
from slmops.optimizer.measure.texts import (
    Text,
    Texts,
    calibration,
    calibration_text,
    evaluation_text,
    overlap,
    read_texts,
    windows_of,
)

LICENSE = Path(__file__).parents[3] / "LICENSE"
WORDS = " ".join(f"word{number}" for number in range(2000))


@pytest.fixture(scope="module")
def bundled() -> Texts:
    return read_texts()


def tokenizer(begin: bool = False):  # type: ignore[no-untyped-def]
    """A tokenizer with one token per word: `word7` is 10, unknown is 0; with `begin`, BOS is token 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"?": 0, "<s>": 1, "</s>": 2} | {word: 3 + number for number, word in enumerate(WORDS.split())}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", bos_token="<s>", eos_token="</s>")


def file(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


def test_the_bundled_texts_do_not_overlap_and_are_long_enough(bundled: Texts) -> None:
    assert overlap(bundled.evaluation.content, bundled.calibration.content) == 0
    assert len(bundled.evaluation.content.split()) > 1000
    assert len(bundled.calibration.content.split()) > 60_000  # Python's language reference alone has this many


def test_the_default_calibration_text_leaves_out_parts_that_overlap_the_evaluation_text(bundled: Texts) -> None:
    """Many READMEs quote this licence."""
    judged = evaluation_text([LICENSE])
    assert overlap(judged.content, bundled.calibration.content) > 0.01
    assert overlap(judged.content, calibration_text([], judged).content) == 0


def test_overlap_is_the_share_of_the_evaluation_text_and_ignores_case() -> None:
    half = " ".join(WORDS.split()[:1000])
    assert overlap(half, WORDS.upper()) == 1
    assert overlap(WORDS, half) == pytest.approx(0.5, abs=0.02)
    assert overlap("completely different", WORDS) == 0
    assert overlap("word5 word6", WORDS) == 1


def test_a_calibration_text_that_overlaps_the_evaluation_text_is_refused(tmp_path: Path) -> None:
    judged = file(tmp_path, "judged.txt", WORDS)
    other = file(tmp_path, "other.txt", "and so on " * 2000)
    little = file(tmp_path, "little.txt", " ".join(WORDS.split()[:20]))  # 8 of 1988 grams
    assert read_texts([judged], [other, little]).calibration.name == "other.txt+little.txt"
    more = file(tmp_path, "more.txt", " ".join(WORDS.split()[:60]))
    with pytest.raises(InvalidMessage, match=r"2\.4% of the evaluation text") as caught:
        read_texts([judged], [other, more])
    assert caught.value.where == "judged.txt, other.txt+more.txt"


@pytest.mark.parametrize(("content", "error"), [(b" \n", InvalidMessage), (b"\xff", InvalidMessage), (None, NotFound)])
def test_a_missing_or_unreadable_text_is_a_typed_error(
    tmp_path: Path, content: bytes | None, error: type[Exception]
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error):
        evaluation_text([path])


def test_a_text_is_identified_by_its_digest(tmp_path: Path) -> None:
    found = [evaluation_text([file(tmp_path, f"{n}.txt", content)]).digest for n, content in enumerate("aab")]
    assert found[0] == found[1] != found[2]


def test_calibration_windows_depend_on_the_seed_and_do_not_repeat() -> None:
    texts = Texts(Text("judged", "something else"), Text("calibration", WORDS))
    drawn = calibration(tokenizer(), 20, 50, 7, texts)
    assert drawn.shape == (20, 50)
    assert drawn.dtype == np.int64
    assert len(set(drawn.ravel())) == 1000
    assert (drawn == calibration(tokenizer(), 20, 50, 7, texts)).all()
    assert (drawn != calibration(tokenizer(), 20, 50, 8, texts)).any()
    assert (np.diff(drawn) == 1).all(), "a window is a piece of text"
    with pytest.raises(InvalidMessage, match="has 40 windows of 50 tokens, fewer than the required 41"):
        calibration(tokenizer(), 41, 50, 7, texts)
    assert len(calibration(tokenizer(), 41, 50, 7, texts, fewest=40)) == 40


def test_every_window_begins_with_the_bos_token() -> None:
    rows = windows_of(tokenizer(begin=True), Text("words", WORDS), 101)
    assert rows.shape == (20, 101)
    assert (rows[:, 0] == 1).all()
    assert (rows[:, 1:].ravel() == np.arange(3, 2003)).all()


def test_a_text_shorter_than_a_window_gives_no_window() -> None:
    assert windows_of(tokenizer(), Text("short", "word1 word2"), 3).shape == (0, 3)


def test_a_tokenizer_that_returns_no_tokens_is_an_invalid_model() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(InvalidModel):
        windows_of(empty, Text("words", WORDS), 4)
