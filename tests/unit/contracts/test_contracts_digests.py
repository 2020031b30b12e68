"""Descriptors, digests and sets of files: the identity of everything large."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Descriptor, Digest, digest_of, digest_of_chunks
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.manifest import MODEL_CONFIG, WEIGHT, Manifest
from slmops.contracts.model import FilePath, ModelFile, collision, files_digest

# printf '' | sha256sum
EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_digest_is_what_sha256sum_prints() -> None:
    assert digest_of(b"") == EMPTY
    assert blob_key(EMPTY) == "blobs/sha256/" + EMPTY[7:]


@given(st.lists(st.binary()))
def test_a_stream_has_the_digest_of_its_bytes(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    assert digest_of_chunks(chunks) == (digest_of(whole), len(whole))


@pytest.mark.parametrize(
    "text", ["", "sha256:", EMPTY.upper(), EMPTY[:-1], EMPTY + "0", EMPTY + "\n", "sha512:" + "0" * 64]
)
def test_another_digest_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Digest).validate_python(text)


def test_a_descriptor_is_encoded_as_oci_json_without_absent_fields() -> None:
    plain = Descriptor.of(b"", "text/plain")
    assert plain.model_dump_json() == f'{{"mediaType":"text/plain","digest":"{EMPTY}","size":0}}'
    noted = Descriptor.of(b"", "text/plain", title="x")
    assert Descriptor.model_validate_json(noted.model_dump_json()) == noted
    with pytest.raises(ValidationError):
        Descriptor(media_type="text/plain", digest=EMPTY, size=-1)


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u202e", "\ud800"])
def test_a_path_with_a_control_character_is_refused(character: str) -> None:
    """A newline would let two sets of files have one identity, because it ends a line of what is hashed."""
    with pytest.raises(ValidationError, match=r"control characters|relative"):
        TypeAdapter(FilePath).validate_python(f"a{character}b")


@pytest.mark.parametrize(
    "paths", [("a", "a"), ("Model.onnx", "model.onnx"), ("\u00e9", "e\u0301"), ("A", "a/b"), ("a/B/c", "A/b")]
)
def test_paths_that_some_file_system_takes_for_one_collide(paths: tuple[str, str]) -> None:
    assert collision(paths) is not None
    assert collision((paths[0], "other", "a.b")) is None


def test_a_set_of_files_is_identified_as_sha256sum_would(tmp_path: Path) -> None:
    contents = {"b/weights.bin": b"\x00\x01", "a.json": b"{}", "z é.txt": b""}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    listed = f"cd '{tmp_path}' && LC_ALL=C sha256sum a.json b/weights.bin 'z é.txt' | sha256sum"
    printed = subprocess.run(["sh", "-c", listed], check=True, capture_output=True, text=True).stdout.split()[0]
    files = [ModelFile(path=p, digest=digest_of(data), size_bytes=len(data)) for p, data in contents.items()]
    assert files_digest(files) == files_digest(reversed(files)) == "sha256:" + printed


def test_a_set_of_files_changes_with_a_name_or_a_byte() -> None:
    one = ModelFile(path="a", digest=digest_of(b"1"), size_bytes=1)
    renamed, rewritten = one.model_copy(update={"path": "b"}), one.model_copy(update={"digest": digest_of(b"2")})
    assert len({files_digest([one]), files_digest([renamed]), files_digest([rewritten]), files_digest([])}) == 4


@pytest.mark.parametrize("path", ["/etc/passwd", "..", "a/../../b", "a\\b", "", ".", "a\0b"])
def test_a_path_that_could_leave_its_folder_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(FilePath).validate_python(path)


@given(st.text())
def test_an_accepted_path_stays_in_its_folder(path: str) -> None:
    try:
        accepted = TypeAdapter(FilePath).validate_python(path)
    except ValidationError:
        return
    home = Path("/home/of/the/model")
    joined = Path(str(home / accepted))
    assert joined != home
    assert home in joined.parents
    assert ".." not in joined.parts


def manifest() -> Manifest:
    return Manifest(config=Descriptor.of(b"{}", MODEL_CONFIG), layers=(Descriptor.of(b"w", WEIGHT),))


def test_a_manifest_is_read_back_with_the_same_bytes() -> None:
    data = manifest().encode()
    assert Manifest.decode(data) == manifest()
    assert Manifest.decode(data).encode() == data


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b'{"schemaVersion":1}'])
def test_bytes_that_do_not_parse_as_a_manifest_are_rejected(data: bytes) -> None:
    with pytest.raises(InvalidMessage):
        Manifest.decode(data)


def test_a_manifest_of_another_kind_is_refused() -> None:
    image = manifest().encode().replace(b"vnd.cncf.model.manifest", b"vnd.example.image")
    with pytest.raises(InvalidMessage):
        Manifest.decode(image)
