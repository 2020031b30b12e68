"""The streams fit the disk, and a disk that is too full is reported before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmops.contracts.errors import DiskFull
from slmops.contracts.subjects import STREAMS, GiB, MiB
from slmops.kit.bus.provision import sized
from slmops.local import capacity as disk
from slmops.local.capacity import capacity

SPECIFIED = sum(stream.max_bytes for stream in STREAMS)


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _folder: free)


def test_a_large_disk_gets_the_specified_streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_free(monkeypatch, 100 * GiB)
    found = capacity(tmp_path, tmp_path / "store")
    assert (found.stream_bytes, found.store_bytes, found.remark) == (SPECIFIED, 75 * GiB, None)


@pytest.mark.parametrize("free", [GiB, 3 * GiB, 6 * GiB, 7 * GiB])
def test_the_streams_of_a_small_disk_fit_the_server_and_leave_room(
    free: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_free(monkeypatch, free)
    found = capacity(tmp_path, tmp_path / "store")
    reserved = sum(stream.max_bytes for stream in sized(STREAMS, found.stream_bytes))
    assert reserved <= found.stream_bytes < found.store_bytes < free
    assert found.remark
    assert "stream resize" in found.remark


@pytest.mark.parametrize(("free", "fresh"), [(GiB - 1, True), (100 * MiB - 1, False)])
def test_a_disk_that_is_too_full_is_refused_with_its_figures(
    free: int, fresh: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_free(monkeypatch, free)
    if not fresh:
        (tmp_path / "store").mkdir()
    with pytest.raises(DiskFull, match=r"MiB free, and slmops needs") as refusal:
        capacity(tmp_path, tmp_path / "store")
    assert refusal.value.where == str(tmp_path)


def test_a_disk_that_was_filled_meanwhile_still_opens_what_the_streams_reserve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, limit in (("EVENTS", 4 * GiB), ("KV_desired", -1)):
        meta = tmp_path / "store/jetstream/ACCOUNT/streams" / name / "meta.inf"
        meta.parent.mkdir(parents=True)
        meta.write_text(json.dumps({"name": name, "max_bytes": limit}))
    with_free(monkeypatch, 200 * MiB)
    assert capacity(tmp_path, tmp_path / "store").store_bytes > 4 * GiB


def test_streams_keep_their_proportions_when_they_are_reduced() -> None:
    assert sized(STREAMS, None) == sized(STREAMS, SPECIFIED) == [*STREAMS]
    halved = sized(STREAMS, SPECIFIED // 2)
    assert [stream.max_bytes * 2 for stream in halved] == [stream.max_bytes for stream in STREAMS]
