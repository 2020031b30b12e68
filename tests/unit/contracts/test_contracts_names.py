"""A name is a NATS token, a KV key and a path segment, so names that are invalid in one of them are rejected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from slmops.contracts.errors import InvalidName, InvalidVersion
from slmops.contracts.names import NAME_PATTERN, Name, Version, check_name, check_version, parse_model_ref

NAME, VERSION = TypeAdapter(Name), TypeAdapter(Version)


@pytest.mark.parametrize("name", ["a", "smollm2", "edge-chat", "0", "a" * 63])
def test_a_valid_name_is_accepted(name: str) -> None:
    assert check_name(name) == NAME.validate_python(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", "A", "a.b", "a*", ">", "a/b", "a b", "a_b", "ä", "a" * 64, "a\n", "\na", "a\u0000", "..", "$KV"],
)
def test_an_invalid_name_is_rejected(name: str) -> None:
    with pytest.raises(InvalidName, match="model name") as caught:
        check_name(name, "model name")
    assert "lowercase" in str(caught.value.fix)
    with pytest.raises(ValidationError):
        NAME.validate_python(name)


@pytest.mark.parametrize("version", ["0.0.0", "1.0.0", "10.20.30", "1.1.0-rc.1", "1.0.0-a-b.7"])
def test_a_valid_version_is_accepted(version: str) -> None:
    assert check_version(version) == VERSION.validate_python(version) == version


@pytest.mark.parametrize(
    "version", ["", "1", "1.0", "1.0.0.0", "01.0.0", "v1.0.0", "1.0.0-", "1.0.0+build", "1.0.0\n", "1.0.0-" + "a" * 64]
)
def test_an_invalid_version_is_rejected(version: str) -> None:
    with pytest.raises(InvalidVersion):
        check_version(version)
    with pytest.raises(ValidationError):
        VERSION.validate_python(version)


@given(st.from_regex(NAME_PATTERN, fullmatch=True))
def test_a_name_is_one_token_everywhere(name: str) -> None:
    assert not set(name) & set(".*>/\\ \t\r\n")
    assert check_name(name) == name


def test_a_model_reference_is_name_and_version() -> None:
    ref = parse_model_ref("smollm2:1.0.0")
    assert (ref.name, ref.version, str(ref)) == ("smollm2", "1.0.0", "smollm2:1.0.0")


@pytest.mark.parametrize(
    ("text", "error"),
    [("smollm2", InvalidVersion), ("smollm2:", InvalidVersion), (":1.0.0", InvalidName), ("a:1.0.0:2", InvalidVersion)],
)
def test_an_incomplete_model_reference_is_rejected(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_model_ref(text)
