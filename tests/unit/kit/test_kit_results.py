"""A results file is complete and sealed or rejected, and contains only messages that the gateway may publish."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from slmops.contracts import subjects
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER, Envelope
from slmops.contracts.errors import InvalidBundle, InvalidMessage, SignatureInvalid, SlmopsError
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.contracts.plan import Identity
from slmops.contracts.results import ResultMessage
from slmops.kit.bus.nats_auth import new_user_seed, public_key, sign
from slmops.kit.sealed_results import ResultsFile, writing

CORPUS = Path(__file__).parents[2] / "corpus" / "results"
AT = datetime(2026, 11, 26, tzinfo=UTC)
WHO = Identity(gateway_id="gw-1", blueprint="edge-chat")
SEED = new_user_seed()


def report(sequence: int, gateway: str = "gw-1") -> ResultMessage:
    event = GatewayReported(
        gateway_id=gateway, blueprint="edge-chat", sequence=sequence, phase=UpdatePhase.COMMITTED, at=AT
    )
    envelope = Envelope(id=f"{gateway}-{sequence}", source="s", type=event.type, time=AT, subject=gateway)
    return ResultMessage(subject=event.subject, headers=envelope.headers(), payload=event.model_dump_json())


def write(out: Path, messages: Sequence[ResultMessage], seed: str = SEED) -> Path:
    with writing(out, WHO, seed, AT) as add:
        for message in messages:
            add(message)
    return out


@pytest.fixture
def file(tmp_path) -> Path:
    return write(tmp_path / "gw-1.slmops-results", [report(1), report(2)])


def test_what_was_written_is_read(file):
    found = ResultsFile(file)
    assert list(found.messages()) == [report(1), report(2)]
    assert (found.seal.public_key, found.seal.messages, found.seal.created_at) == (public_key(SEED), 2, AT)


def test_every_flipped_bit_is_rejected(file):
    data = file.read_bytes()
    for position in range(len(data)):
        harmed = bytearray(data)
        harmed[position] ^= 1 << (position * 5 + position // 8) % 8
        file.write_bytes(harmed)
        with pytest.raises((InvalidBundle, InvalidMessage, SignatureInvalid)):
            ResultsFile(file)


def _lines(*order: int) -> Callable[[list[bytes]], bytes]:
    return lambda lines: b"".join(lines[number] for number in order)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_lines(0, 2), "do not match the seal"),
        (_lines(1, 0, 2), "do not match the seal"),
        (_lines(0, 1, 1, 2), "do not match the seal"),
        (_lines(0, 1), "not a valid seal"),
        (_lines(), "not a valid seal"),
        (lambda lines: b"".join(lines)[:-1], "cut off"),
        (lambda lines: b"x" * (2 << 20) + b"\n" + lines[2], "longer than a gateway writes"),
    ],
)
def test_missing_duplicate_reordered_or_oversized_lines_are_rejected(file, harm, said):
    file.write_bytes(harm(file.read_bytes().splitlines(keepends=True)))
    with pytest.raises(InvalidBundle, match=said):
        ResultsFile(file)


def test_a_seal_signed_by_another_key_is_rejected(file):
    *messages, _seal = file.read_bytes().splitlines(keepends=True)
    seal = ResultsFile(file).seal
    signature = base64.b64encode(sign(new_user_seed(), seal.statement)).decode()
    forged = seal.model_copy(update={"signature": signature})
    file.write_bytes(b"".join(messages) + forged.model_dump_json().encode() + b"\n")
    with pytest.raises(SignatureInvalid):
        ResultsFile(file)


def test_files_found_by_the_fuzzer_are_rejected_with_their_reason():
    for kept in CORPUS.iterdir():
        with pytest.raises(SlmopsError) as error:
            list(ResultsFile(kept).messages())
        assert error.value.what, kept.name


@pytest.mark.parametrize(
    "message",
    [
        report(1, "gw-2"),
        report(1).model_copy(update={"subject": report(1, "gw-2").subject}),
        report(1).model_copy(update={"payload": report(1, "gw-2").payload}),
        report(1).model_copy(update={"subject": "slmops.rollout.completed.v1"}),
        report(1).model_copy(update={"subject": subjects.measurements("gw-1")}),
        report(1).model_copy(update={"headers": {}}),
        report(1).model_copy(update={"headers": report(1).headers | {MESSAGE_ID_HEADER: "another"}}),
        report(1).model_copy(update={"headers": report(1).headers | {"Nats-Rollup": "all"}}),
    ],
)
def test_a_results_file_may_contain_only_messages_that_the_bus_would_allow(tmp_path, message):
    found = ResultsFile(write(tmp_path / "file", [message]))
    with pytest.raises(SlmopsError) as error:
        list(found.messages())
    assert isinstance(error.value, InvalidBundle | InvalidMessage)
