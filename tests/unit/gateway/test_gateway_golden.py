"""Reading and writing golden prompt files."""

import pytest

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.prompts.golden import GoldenPrompt, check_golden, dump_golden, parse_golden


def test_written_prompts_are_read_back_unchanged() -> None:
    prompts = (
        GoldenPrompt(prompt="Capital of France?", expect=("Paris", "París")),
        GoldenPrompt(prompt="é", expect=("1",)),
    )
    assert parse_golden(dump_golden(prompts)) == prompts


def test_any_expected_text_passes_in_any_case() -> None:
    golden = GoldenPrompt(prompt="?", expect=("Paris", "Lutetia"))
    assert golden.passes("it is PARIS.")
    assert golden.passes("lutetia")
    assert not golden.passes("Lyon Lyon Lyon Lyon")
    assert not golden.passes("")


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"prompt": "", "expect": ["x"]}',
        '{"prompt": "x", "expect": []}',
        '{"prompt": "x", "expect": [""]}',
        '{"prompt": "x", "expect": [" "]}',
        '{"prompt": "x", "expect": ["y"], "max_tokens": 0}',
    ],
)
def test_an_error_names_the_bad_line_without_quoting_it(line: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        parse_golden('{"prompt": "fine", "expect": ["fine"]}\n\n' + line)
    assert caught.value.where == "golden.jsonl line 3"


def test_only_a_line_feed_ends_a_line() -> None:
    """`str.splitlines` also splits at these characters, which a JSON string may contain and which we do not escape."""
    prompts = (GoldenPrompt(prompt="one\u2028two\u2029three\x85four", expect=("a\u2028b",)),)
    assert parse_golden(dump_golden(prompts)) == prompts
    assert parse_golden(dump_golden(prompts).replace("\n", "\r\n")) == prompts


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"prompt": "x", "expect": ["y"], "max_token": 9}', "unknown field 'max_token'"),
        ('{"prompt": "x", "expect": ["y"], "expect": ["z"]}', "'expect' occurs twice"),
        ('{"prompt": "fine", "expect": ["foul"]}', "other answers to the prompt of line 1"),
        ("[" * 100_000, "not valid"),
        ('{"prompt": "x", "expect": "y"}', "expect: Input should be a valid"),
    ],
    ids=["misspelt", "key twice", "contradiction", "deep", "type"],
)
def test_what_an_author_cannot_have_meant_is_refused(line: str, match: str) -> None:
    with pytest.raises(InvalidMessage, match=match) as caught:
        check_golden('{"prompt": "fine", "expect": ["fine"]}\n\n' + line)
    assert caught.value.where == "golden.jsonl line 3"


def test_a_gateway_reads_fields_of_a_later_release() -> None:
    assert parse_golden('{"prompt": "x", "expect": ["y"], "new": 1}')[0].prompt == "x"


def test_a_prompt_may_be_repeated_with_the_same_answers() -> None:
    first, second = ('{"prompt": "x", "expect": ["y", "z"]}', '{"prompt": "x", "expect": ["z", "y"]}')
    assert len(check_golden(f"{first}\n{second}\n")) == 2
