"""Stop strings over pieces of text: the result does not depend on how the text is split."""

from hypothesis import given
from hypothesis import strategies as st

from slmops.gateway.serving.stopwords import StopWords


def shown(pieces: list[str], words: tuple[str, ...]) -> tuple[str, bool]:
    stops = StopWords(words)
    return "".join(stops.feed(piece) for piece in pieces) + stops.flush(), stops.hit


def test_a_stop_string_across_pieces_is_never_shown() -> None:
    assert shown(["one E", "N", "D two"], ("END",)) == ("one ", True)


def test_a_partial_stop_string_at_the_end_is_shown() -> None:
    assert shown(["one EN"], ("END",)) == ("one EN", False)


def test_text_is_not_held_back_longer_than_needed() -> None:
    assert StopWords(("END",)).feed("one E") == "one "
    assert StopWords(()).feed("one E") == "one E"


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_the_answer_ends_exactly_before_a_stop_string(pieces: list[str], words: list[str]) -> None:
    whole = "".join(pieces)
    text, hit = shown(pieces, tuple(words))
    assert whole.startswith(text)
    assert hit == any(word in whole for word in words)
    assert not any(word in text for word in words)
    if not hit:
        assert text == whole
    else:
        assert any(whole.startswith(word, len(text)) for word in words)
