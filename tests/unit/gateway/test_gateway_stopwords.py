"""Stop strings over pieces of text: the result does not depend on how the text is split."""

from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from slmops.gateway.serving.stopwords import StopWords

README = (Path(__file__).parents[3] / "services/gateway/README.md").read_text()


def shown(pieces: list[str], words: tuple[str, ...]) -> tuple[str, bool]:
    stops = StopWords(words)
    return "".join(stops.feed(piece) for piece in pieces) + stops.flush(), stops.hit


def reference(text: str, words: tuple[str, ...]) -> tuple[str, bool]:
    """The same, one character at a time and without holding anything back: slow and obviously right."""
    for end in range(1, len(text) + 1):
        ended = [len(word) for word in words if word and text[:end].endswith(word)]
        if ended:
            return text[: end - max(ended)], True
    return text, False


def split(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


def test_a_stop_string_across_pieces_is_never_shown() -> None:
    assert shown(["one E", "N", "D two"], ("END",)) == ("one ", True)


def test_a_partial_stop_string_at_the_end_is_shown() -> None:
    assert shown(["one EN"], ("END",)) == ("one EN", False)


def test_text_is_not_held_back_longer_than_needed() -> None:
    assert StopWords(("END",)).feed("one E") == "one "
    assert StopWords(()).feed("one E") == "one E"


def test_every_substring_of_a_long_text_is_found_in_pieces_of_the_size_of_tokens() -> None:
    pieces = [README[at : at + 4] for at in range(0, 4000, 4)]
    words = [README[at : at + length] for length in (2, 7, 20, 60) for at in range(0, 3900, 26)]
    assert len(words) == 600
    missed = [word for word in words if shown(pieces, (word,)) != reference("".join(pieces), (word,))]
    assert missed == []


def test_the_string_that_is_complete_first_counts_however_the_text_is_split() -> None:
    words = ("b", "abc")
    assert shown(["xabc"], words) == shown(list("xabc"), words) == ("xa", True)
    assert shown(["xabc"], ("bc", "abc")) == ("x", True)


_TEXT = st.text("ab", max_size=60)


@given(_TEXT, st.lists(st.integers(min_value=0), max_size=12), st.lists(st.text("ab", max_size=12), max_size=4))
def test_any_words_in_any_pieces_give_the_result_of_the_reference(text: str, cuts: list[int], words: list[str]) -> None:
    assert shown(split(text, cuts), tuple(words)) == reference(text, tuple(words))


@given(_TEXT, st.lists(st.integers(min_value=0), max_size=12), st.data())
def test_long_words_of_the_text_itself_give_the_result_of_the_reference(
    text: str, cuts: list[int], data: st.DataObject
) -> None:
    bounds = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    words = tuple(text[start:end] for start, end in data.draw(st.lists(bounds, max_size=4)))
    assert shown(split(text, cuts), words) == reference(text, words)
