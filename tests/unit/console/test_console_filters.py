"""Filters of `slmops gateway ls` that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.console.console_examples import nothing_set_up, slmops


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing_set_up(monkeypatch, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--label", "ring"),
        ("--label", "=a"),
        ("--label", "a=b", "--label", "a=c"),
        ("--state", "sleepy"),
        ("--attention", "love"),
        ("--version", "latest"),
        ("--blueprint", "../x"),
        ("--silent-for", "soon"),
        ("--revoked", "--state", "online"),
    ],
    ids=" ".join,
)
def test_a_wrong_filter_is_a_typed_error_before_anything_is_asked(wrong: tuple[str, ...]) -> None:
    done = slmops("gateway", "ls", *wrong, "--json")
    assert done.exit_code == 65, done.output
    assert "fix" in done.output
