"""A bundle has one valid encoding. Other files are rejected with a reason, in bounded memory and time."""

from __future__ import annotations

import io
import json
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slmops.contracts.bundle import INDEX_NAME, PLAN_NAME, BundleIndex, Member, blob_name, metadata_name
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import InvalidBundle
from slmops.kit.bundle import BundleFile, write_bundle

CORPUS = Path(__file__).parents[2] / "corpus" / "bundle"
AT = datetime(2030, 1, 1, tzinfo=UTC)
BLOB = b"weights" * 100
CONTENT = {PLAN_NAME: b"{}", metadata_name("timestamp.json"): b"x" * 512, blob_name(digest_of(BLOB)): BLOB}
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def members(content: dict[str, bytes]) -> tuple[Member, ...]:
    return tuple(
        Member(name=name, digest=digest_of(content[name]), size=len(content[name])) for name in sorted(content)
    )


def index(content: dict[str, bytes]) -> BundleIndex:
    return BundleIndex(blueprint="edge-chat", created_at=AT, packages=(), members=members(content))


def made(folder: Path) -> bytes:
    write_bundle(folder / "good.slmops", index(CONTENT), dict(CONTENT))
    return (folder / "good.slmops").read_bytes()


def read_all(path: Path, data: bytes) -> dict[str, bytes]:
    """Returns the contents of a bundle. Raises for other files."""
    path.write_bytes(data)
    bundle = BundleFile(path)
    bundle.check()
    return {member.name: bundle.read(member.name, 1 << 20) for member in bundle.index.members}


def test_what_was_written_is_read_and_written_the_same_again(tmp_path: Path) -> None:
    data = made(tmp_path)
    assert read_all(tmp_path / "b", data) == CONTENT
    assert made(tmp_path) == data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:  # any tar program can read it
        assert tar.getnames() == [INDEX_NAME, *sorted(CONTENT)]
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_content_that_does_not_match_its_digest_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundle, match="does not match its digest in the index"):
        write_bundle(tmp_path / "b", index(CONTENT), CONTENT | {PLAN_NAME: b"[]"})
    assert list(tmp_path.iterdir()) == []


def test_a_member_above_the_size_limit_is_not_read(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(InvalidBundle, match="512 bytes where 511"):
        BundleFile(tmp_path / "good.slmops").read(metadata_name("timestamp.json"), 511)


@pytest.mark.parametrize(
    "name",
    ["../plan.json", "/plan.json", "metadata/../plan.json", "metadata/0.root.json", "metadata/1.root.json\n", "x", "",
     "blobs/sha256/../../x", "plan.json/", "blobs/sha256/" + "A" * 64, "metadata/timestamp.jsonx"],
)  # fmt: skip
def test_a_member_name_outside_the_grammar_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Member(name=name, digest=digest_of(b""), size=0)


def test_a_blob_is_named_by_its_digest_and_each_member_is_listed_once() -> None:
    with pytest.raises(ValueError, match="named by its digest"):
        Member(name=blob_name(digest_of(b"a")), digest=digest_of(b"b"), size=1)
    one = members(CONTENT)
    for wrong in ((one[0], one[0]), one[::-1]):
        with pytest.raises(ValueError, match="sorted by name"):
            BundleIndex(blueprint="edge-chat", created_at=AT, packages=(), members=wrong)


def corpus(folder: Path) -> dict[str, bytes]:
    """Returns hostile files by their defect. Written by: cd tests && python -m unit.kit.test_kit_bundle."""
    good = made(folder)
    start = good.index(b"{") - 512

    def tar(kind: bytes, name: str = PLAN_NAME, link: str = "") -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as made:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            made.addfile(info)
        return out.getvalue()

    first = _member(good, "blobs/")
    return {
        "empty": b"",
        "one-byte": b"b",
        "cut-off": good[: len(good) - 2000],
        "cut-off-in-index": good[:600],
        "without-end": good[:-1024],
        "more-after-end": good + b"\0" * 512,
        "another-after-end": good + good,
        "a-link": tar(tarfile.SYMTYPE, INDEX_NAME, "/etc/passwd"),
        "a-device": tar(tarfile.CHRTYPE, INDEX_NAME),
        "pax-header": tar(tarfile.REGTYPE, "é" * 60),
        "size-negative": good[:start] + good[start : start + 124] + b"-0000000001" + good[start + 135 :],
        "index-of-exabytes": good[:124] + b"77777777777" + good[135:],
        "link-in-the-place-of-a-file": good[: first + 156] + b"2" + good[first + 157 :],
        "another-owner": good[: first + 108] + b"0000001" + good[first + 115 :],
        "padding-with-something": _padded_with(good),
        "index-no-json": good.replace(b'{"format":1', b'["format":1'),
        "index-format-2": good.replace(b'{"format":1', b'{"format":2'),
        "index-climbs": good.replace(b'"name":"plan.json"', b'"name":"../n.json"'),
        "blob-changed": good.replace(b"weightsweights", b"weightsWeights", 1),
    }


def _member(data: bytes, name: str) -> int:
    """Returns the offset of the member's first header."""
    return next(at for at in range(512, len(data), 512) if data[at:].startswith(name.encode()))


def _padded_with(good: bytes) -> bytes:
    end = _member(good, "blobs/") + 512 + len(BLOB)
    return good[:end] + b"!" + good[end + 1 :]


def test_each_hostile_file_of_the_corpus_is_rejected_with_its_reason(tmp_path: Path) -> None:
    kept = {path.name: path.read_bytes() for path in CORPUS.iterdir()}
    assert kept.keys() >= corpus(tmp_path).keys()
    for name, data in kept.items():
        with pytest.raises(InvalidBundle) as error:
            read_all(tmp_path / "b", data)
        assert error.value.what, name


@FUZZ
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 3), junk=st.binary(max_size=40))
@example(at=0, byte=0, cut=0, junk=b"")
def test_a_changed_bundle_has_the_same_content_or_is_rejected(
    tmp_path: Path, at: int, byte: int, cut: int, junk: bytes
) -> None:
    data = made(tmp_path)
    at %= len(data)
    changed = data[:at] + bytes([byte]) + junk + data[at + 1 + cut :]
    assert same_or_refused(tmp_path, data, changed)


@FUZZ
@given(data=st.binary(max_size=3000))
def test_random_bytes_are_rejected(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InvalidBundle):
        read_all(tmp_path / "b", data)


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@FUZZ
@given(field=st.sampled_from(["format", "blueprint", "created_at", "packages", "members", "more"]), value=json_values)
def test_every_value_of_an_index_field_is_accepted_or_rejected_with_a_typed_error(field: str, value: Any) -> None:
    document = json.loads(index(CONTENT).model_dump_json()) | {field: value}
    try:
        found = BundleIndex.decode(json.dumps(document).encode())
    except InvalidBundle:
        return
    assert BundleIndex.decode(found.model_dump_json().encode()) == found


def same_or_refused(folder: Path, good: bytes, data: bytes) -> bool:
    """Returns whether the content is the same. The index itself has no digest, so another date is a valid bundle."""
    try:
        return read_all(folder / "b", data) == CONTENT and len(data) == len(good)
    except InvalidBundle:
        return True


if __name__ == "__main__":
    import tempfile

    CORPUS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in corpus(Path(folder)).items():
            (CORPUS / name).write_bytes(data)
