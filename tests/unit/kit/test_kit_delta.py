"""Deltas are exact for every pair, small for similar pairs, and reject other bases."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.kit.delta_models import applied, contents, made, tensors, tuned, write

from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import DigestMismatch, InvalidDelta, InvalidModel, NotFound, SlmopsError
from slmops.kit.delta import apply, by_digest, describe, make
from slmops.kit.delta.format import PIECE_BYTES

CONFIG = " ".join(str(n * n) for n in range(500))
CORPUS = Path(__file__).parents[2] / "corpus" / "delta"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, before = tmp_path_factory.mktemp("pair"), tensors(rows=512)
    base = write(folder / "base", before, config=CONFIG, tokenizer="{}" * 5000)
    return base, write(folder / "target", tuned(before), config=CONFIG.replace("77", "78"), tokenizer="{}" * 5000)


def test_a_fine_tuned_model_is_a_few_percent_and_exact(pair, tmp_path):
    stat, delta = made(*pair, tmp_path)
    assert contents(applied(delta, pair[0], tmp_path / "out")) == contents(pair[1])
    assert stat.size_bytes == delta.stat().st_size < 0.08 * stat.target_bytes
    assert describe(delta) == stat
    assert set(stat.codings) == {"copy", "sparse", "floats", "patch"}


def test_changed_codes_cost_about_their_entropy(pair, tmp_path):
    share = describe(made(*pair, tmp_path)[1]).codings["sparse"]
    codes = 512 * 1024 + 512 * 512
    entropy_bits = -(0.005 * np.log2(0.005) + 0.995 * np.log2(0.995)) + 0.005  # positions, and one bit for the sign
    assert share.delta_bytes < 1.15 * codes * entropy_bits / 8


def test_removing_a_layer_and_renumbering_the_others_makes_a_tiny_delta(tmp_path):
    layers = {f"layers.{n}.{name}": array for n in range(4) for name, array in tensors(n).items()}
    kept = {f"layers.{n}.{k}": layers[f"layers.{m}.{k}"] for n, m in enumerate((0, 2, 3)) for k in tensors()}
    base, target = write(tmp_path / "base", layers), write(tmp_path / "target", kept)
    stat, delta = made(base, target, tmp_path)
    assert contents(applied(delta, base, tmp_path / "out")) == contents(target)
    assert stat.size_bytes < 0.01 * stat.target_bytes


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        pytest.param({"w_q0": "q"}, {"w_q0": "qk", "w_q1": "v"}, "q", id="begins the same"),
        pytest.param({"w_q0": "q", "w_q1": "kv"}, {"w_q0": "QKV"}, "KV", id="ends as another one did"),
        pytest.param({"w_q0": "q", "w_q1": "kv"}, {"w_q0": "qK", "w_q1": "v"}, "qv", id="one part moved"),
        pytest.param({"other.w_q0": "qk"}, {"w_q0": "q"}, "", id="a stranger is not looked at"),
    ],
)
def test_matrices_that_were_packed_differently_are_matched(tmp_path, before, after, kept):
    """8-bit codes. Upper and lower case stand for the same matrix with some changed codes."""
    parts = {name: tensors(number)["codes8"] for number, name in enumerate("qkv")}
    parts |= {name.upper(): tuned(tensors(number))["codes8"] for number, name in enumerate("qkv")}
    base, target = (
        write(tmp_path / side, {name: np.concatenate([parts[part] for part in packed]) for name, packed in of.items()})
        for side, of in (("base", before), ("target", after))
    )
    stat, delta = made(base, target, tmp_path)
    assert contents(applied(delta, base, tmp_path / "out")) == contents(target)
    near = sum(share.target_bytes for name, share in stat.codings.items() if name in ("sparse", "copy"))
    assert near == len(kept) * parts["q"].nbytes


def test_a_grown_vocabulary_costs_only_its_new_rows(tmp_path):
    random = np.random.default_rng(0)
    before = random.normal(0, 1, (2000, 64)).astype(np.float16)
    after = np.concatenate([before * np.float16(1.001), random.normal(0, 1, (100, 64)).astype(np.float16)])
    base, target = write(tmp_path / "base", {"embed": before}), write(tmp_path / "target", {"embed": after})
    stat, delta = made(base, target, tmp_path)
    assert contents(applied(delta, base, tmp_path / "out")) == contents(target)
    assert stat.codings["floats"].target_bytes == before.nbytes


def test_an_unrelated_model_costs_no_more_than_zstd(tmp_path):
    base, target = write(tmp_path / "base", tensors(1, rows=512)), write(tmp_path / "target", tensors(2, rows=512))
    stat, delta = made(base, target, tmp_path)
    assert contents(applied(delta, base, tmp_path / "out")) == contents(target)
    alone = zstandard.ZstdCompressor(level=19).compress((target / "model.safetensors").read_bytes())
    assert stat.size_bytes < 1.01 * len(alone)


@pytest.mark.parametrize(
    ("base", "target"),
    [
        (b"", b""),
        (b"", b"new"),
        (b"old", b""),
        (b"GGUF" + b"\xff" * 40, b"GGUF but no model"),
        (b"x" * (3 * PIECE_BYTES + 5), b"x" * (3 * PIECE_BYTES + 4) + b"y"),
    ],
)
def test_any_two_files_have_a_delta(tmp_path, base, target):
    (tmp_path / "a.gguf").write_bytes(base)
    (tmp_path / "b.gguf").write_bytes(target)
    made(tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path)
    out = applied(tmp_path / "it.delta", tmp_path / "a.gguf", tmp_path / "out")
    assert contents(out) == {"b.gguf": target}


@given(st.binary(max_size=4096), st.lists(st.tuples(st.integers(0, 4095), st.binary(max_size=40)), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_any_edit_of_any_bytes_is_exact(tmp_path, base, edits):
    target = bytearray(base)
    for place, data in edits:
        target[place : place + len(data) // 2] = data
    (tmp_path / "a.bin").write_bytes(base)
    (tmp_path / "b.bin").write_bytes(target)
    _, delta = made(tmp_path / "a.bin", tmp_path / "b.bin", tmp_path)
    (tmp_path / "out" / "b.bin").unlink(missing_ok=True)
    assert contents(applied(delta, tmp_path / "a.bin", tmp_path / "out")) == {"b.bin": bytes(target)}


@pytest.mark.parametrize("share", [0.0001, 0.005, 0.1, 0.24, 0.26, 0.6, 1.0])
@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "i4", "f8"])
def test_every_share_of_changes_in_every_kind_of_value_is_exact(tmp_path, share, dtype):
    random = np.random.default_rng(0)
    before = random.integers(0, 256, 40_000, dtype=np.uint8).view(dtype)
    after = before.copy()
    changed = random.random(after.size) < share
    after.view(f"u{after.itemsize}")[changed] += 3
    base, target = write(tmp_path / "base", {"t": before}), write(tmp_path / "target", {"t": after})
    made(base, target, tmp_path)
    assert contents(applied(tmp_path / "it.delta", base, tmp_path / "out")) == contents(target)


def test_a_wrong_base_of_the_same_size_is_distinguished_from_a_damaged_delta(pair, tmp_path):
    _, delta = made(*pair, tmp_path)
    bases = by_digest(pair[0])
    swapped = write(tmp_path / "swapped", tensors(7, rows=512), config=CONFIG, tokenizer="{}" * 5000)
    wrong = {digest: swapped / path.name for digest, path in bases.items()}
    with pytest.raises(DigestMismatch, match=r"the base model\.safetensors is sha256:"):
        apply(delta, wrong, lambda file: tmp_path / "out" / file.path, limit_bytes=1 << 30)
    assert "model.safetensors" not in contents(tmp_path / "out")


def test_a_missing_base_is_named(pair, tmp_path):
    _, delta = made(*pair, tmp_path)
    with pytest.raises(NotFound, match=r"the base .* is missing"):
        apply(delta, {}, lambda file: tmp_path / "out" / file.path, limit_bytes=1 << 30)


def test_only_wanted_files_are_written_and_correct_files_are_kept(pair, tmp_path):
    _, delta = made(*pair, tmp_path)
    there = tmp_path / "out" / "config.json"
    there.parent.mkdir()
    there.write_bytes((pair[1] / "config.json").read_bytes())
    inode = there.stat().st_ino
    places = {"config.json": there, "model.safetensors": tmp_path / "out" / "m"}
    written = apply(delta, by_digest(pair[0]), lambda file: places.get(file.path), limit_bytes=1 << 30)
    assert written == [there, tmp_path / "out" / "m"]
    assert there.stat().st_ino == inode
    assert sorted(contents(tmp_path / "out")) == ["config.json", "m"]


def test_a_wrong_file_in_the_place_of_a_target_is_replaced(pair, tmp_path):
    """It was kept, and the command said that it was verified."""
    _, delta = made(*pair, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for name, data in contents(pair[1]).items():
        (out / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    apply(delta, by_digest(pair[0]), lambda file: out / file.path, limit_bytes=1 << 30)
    assert contents(out) == contents(pair[1])


def test_a_file_of_the_base_and_a_folder_are_not_replaced(pair, tmp_path):
    _, delta = made(*pair, tmp_path)
    base = shutil.copytree(pair[0], tmp_path / "base")
    (tmp_path / "out" / "model.safetensors").mkdir(parents=True)
    for out in (base, tmp_path / "out"):
        with pytest.raises(InvalidDelta, match="belongs to the base or is a folder"):
            apply(delta, by_digest(base), lambda file, out=out: out / file.path, limit_bytes=1 << 30)
    assert contents(base) == contents(pair[0])


def test_links_to_files_are_read_and_other_links_are_refused(tmp_path):
    base = write(tmp_path / "base", tensors(), config=CONFIG)
    (base / "config.json").rename(tmp_path / "blob")
    (base / "config.json").symlink_to(tmp_path / "blob")
    assert {path.name for path in by_digest(base).values()} == {"config.json", "model.safetensors"}
    for name, target, problem in (("a.txt", "gone", "does not exist"), ("b", tmp_path / "base", "link to a folder")):
        (base / name).symlink_to(target)
        with pytest.raises(InvalidModel, match=problem) as refusal:
            make(base, base, tmp_path / "it.delta")
        assert refusal.value.where == str(base / name)
        (base / name).unlink()


# ---- hostile deltas -------------------------------------------------------------------------------------------


def refused(delta: Path, base: Path, out: Path) -> SlmopsError:
    """Returns the error after checking that no file was left."""
    with pytest.raises((InvalidDelta, DigestMismatch, NotFound)) as caught:
        applied(delta, base, out)
    left = contents(out)
    assert not [path for path in left if path.endswith((".part", ".new"))]
    return caught.value


def test_a_small_delta_with_a_large_target_is_refused_before_anything_is_written(tmp_path):
    """500 kB of zeros in a few hundred bytes: the wanted files may have `limit_bytes` together, and no more."""
    base, target = tmp_path / "base", tmp_path / "target"
    for folder, size in ((base, 10), (target, 500_000)):
        folder.mkdir()
        (folder / "a.bin").write_bytes(bytes(size))
    (target / "b.bin").write_bytes(bytes(7))
    make(base, target, tmp_path / "it.delta")
    out = tmp_path / "out"
    for limit, place in (
        (500_006, lambda file: out / file.path),
        (6, lambda file: out if file.path == "b.bin" else None),
    ):
        with pytest.raises(InvalidDelta, match="more than the allowed"):
            apply(tmp_path / "it.delta", by_digest(base), place, limit_bytes=limit)
        assert not out.exists()
    apply(tmp_path / "it.delta", by_digest(base), lambda file: out / file.path, limit_bytes=500_007)
    assert contents(out) == contents(target)


@pytest.mark.parametrize("paths", [("a", "A"), ("a", "a/b"), ("\u00e9", "e\u0301"), ("a\nb", "c")])
def test_a_delta_with_colliding_or_hidden_paths_is_refused(tmp_path, paths):
    (tmp_path / "base").write_bytes(b"")
    file = {"digest": digest_of(b""), "size_bytes": 0}
    header = json.dumps({"base": [], "target": [{"path": path, **file} for path in paths]}).encode()
    frame = zstandard.ZstdCompressor().compress(header)
    (tmp_path / "it.delta").write_bytes(struct.pack("<8sHI", b"SLMDELTA", 1, len(frame)) + frame)
    assert isinstance(refused(tmp_path / "it.delta", tmp_path / "base", tmp_path / "out"), InvalidDelta)
    assert not (tmp_path / "out").exists()


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
def test_a_flipped_bit_or_a_cut_is_refused_or_harmless(pair, tmp_path, data):
    """A flipped unused bit (zstd has a few) may be accepted; then the target is still exact."""
    delta = tmp_path / "it.delta"
    if not delta.exists():
        made(*pair, tmp_path)
    good = delta.read_bytes()
    place, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    bad = bytearray(good)
    bad[place] ^= 1 << bit
    cut = data.draw(st.booleans())
    (tmp_path / "bad.delta").write_bytes(bytes(good[:place]) if cut else bytes(bad))
    out = tmp_path / f"out-{place}-{bit}-{cut}"
    try:
        applied(tmp_path / "bad.delta", pair[0], out)
    except (InvalidDelta, DigestMismatch, NotFound):
        assert cut or not out.exists() or all(v == contents(pair[1])[k] for k, v in contents(out).items())
    else:
        assert not cut
        assert sorted(contents(out).values()) == sorted(contents(pair[1]).values())


def delta_of(header: bytes, records: bytes = b"") -> bytes:
    frame = zstandard.ZstdCompressor().compress(header)
    return struct.pack("<8sHI", b"SLMDELTA", 1, len(frame)) + frame + records


def header(size: int = 10, path: str = "x", base: str = "[]") -> bytes:
    file = f'{{"path": "{path}", "digest": "{digest_of(b"y")}", "size_bytes": {size}}}'
    return f'{{"base": {base}, "target": [{file}]}}'.encode()


def record(coding: int, *streams: bytes, width: int = 1, shift: int = 0, made: int = 10, base: int = 0) -> bytes:
    fixed = struct.pack("<BBBBIQII", coding, width, shift, len(streams), 0, 0, base, made)
    return fixed + struct.pack(f"<{len(streams)}I", *map(len, streams)) + b"".join(streams)


PACK = zstandard.ZstdCompressor().compress
BASE = f'[{{"path": "a.bin", "digest": "{digest_of(b"0123456789")}", "size_bytes": 10}}]'
BOMB = PACK(b"\0" * (64 << 20))
HOSTILE = {
    "nothing": (b"", "the file is not a delta"),
    "another version": (struct.pack("<8sHI", b"SLMDELTA", 9, 0), "has version 9"),
    "an endless header": (struct.pack("<8sHI", b"SLMDELTA", 1, 1 << 31), "header claims"),
    "a bomb for a header": (struct.pack("<8sHI", b"SLMDELTA", 1, len(BOMB)) + BOMB, "decompresses to more than"),
    "a path that climbs": (delta_of(header(path="../../etc/passwd")), "the delta's header is damaged"),
    "an absolute path": (delta_of(header(path="/etc/passwd")), "the delta's header is damaged"),
    "another digest": (delta_of(header().replace(b"sha256", b"sha512")), "the delta's header is damaged"),
    "no records": (delta_of(header()), "is cut off"),
    "an unknown coding": (delta_of(header(), record(77)), "unknown coding 77"),
    "more than its file": (delta_of(header(), record(1, b"", made=11)), "where 10 are left"),
    "a bomb": (delta_of(header(), record(1, BOMB)), "decompresses to more than"),
    "an endless stream": (
        delta_of(header(), struct.pack("<BBBBIQIII", 1, 1, 0, 1, 0, 0, 0, 10, 1 << 31)),
        "a record claims",
    ),
    "a base that is not named": (delta_of(header(), record(0, base=10)), "base file 0 of 0"),
    "beyond its base": (delta_of(header(11, base=BASE), record(0, made=11, base=11)), "of a base file of 10"),
    "places beyond the base": (
        delta_of(header(base=BASE), record(2, PACK(b"\xc8"), PACK(b""), PACK(b"\1"), base=10)),
        "changes value 200 of 10",
    ),
    "more changes than places": (
        delta_of(header(base=BASE), record(2, PACK(b"\1"), PACK(b""), PACK(b"\1\1"), base=10)),
        "1 places and 2 changes",
    ),
    "too many streams": (delta_of(header(), record(1, *[PACK(b"")] * 3)), "has 3 streams, not 1"),
    "values of no size": (delta_of(header(), record(1, width=0)), "values of 0 bytes"),
    "something at its end": (
        delta_of(header(0).replace(digest_of(b"y").encode(), digest_of(b"").encode()), b"more"),
        "bytes after its last record",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_delta_is_refused_with_its_reason(tmp_path, name):
    data, reason = HOSTILE[name]
    (tmp_path / "bad.delta").write_bytes(data)
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    assert reason in str(refused(tmp_path / "bad.delta", tmp_path / "a.bin", tmp_path / "out"))


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_what_a_fuzzer_found_stays_refused(tmp_path, path):
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    assert refused(path, tmp_path / "a.bin", tmp_path / "out").what
    assert (tmp_path / "a.bin").read_bytes() == b"0123456789"


def test_making_a_delta_on_a_full_disk_leaves_no_file(pair, monkeypatch, tmp_path):
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make(*pair, tmp_path / "it.delta")
    assert list(tmp_path.iterdir()) == []
