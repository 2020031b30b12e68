"""Reading and writing golden prompt files."""

import pytest

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.golden import GoldenPrompt, dump_golden, parse_golden


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
