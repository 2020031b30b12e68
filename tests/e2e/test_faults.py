"""Bad input and faults, as a user meets them: an error that says what, where and what to do, and no half state."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tiny_model import make_gguf
from up import Done, Up, begin, ended, until

from slmops.console.settings import find
from slmops.contracts.commands import BeginUpload, RegisterVersion
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import DigestMismatch
from slmops.contracts.model import ModelFile
from slmops.kit.bus.client import BusClient

REGISTERED = "known"
BLUEPRINT = "name: edge-chat\nmodel: tiny\n"
AT_ONCE_S = 15
WRONG_USAGE = 2
WRONG_INPUT = 65
NOT_NOW = 75
NOT_PERMITTED = 77
LARGE_BYTES = 20 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a hand could get wrong."""
    folder = tmp_path_factory.mktemp("files")
    whole = make_gguf(folder / "whole.gguf").read_bytes()
    (folder / "text.gguf").write_text("weights")
    (folder / "cut.gguf").write_bytes(whole[:-100])
    make_gguf(folder / "other.gguf", rows=401)
    make_gguf(folder / "mamba.gguf", architecture="mamba")
    (folder / "no-tokenizer").mkdir()
    (folder / "no-tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "golden.jsonl").write_text('{"prompt": "a", "expect": ["b"]}\n{"prompt": "a"\n')
    (folder / "misspelt.yaml").write_text(BLUEPRINT + "stagess: []\n")
    (folder / "profile.yaml").write_text(BLUEPRINT + "profile: mainframe\n")
    (folder / "tab.yaml").write_text("name: edge-chat\n\tmodel: tiny\n")
    (folder / "blueprint.yaml").write_text(BLUEPRINT)
    return folder


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Up]:
    """A system with one version, which is no real model, and one blueprint, of which there is no package."""
    up = Up(tmp_path_factory.mktemp("faults") / "data", gateways=0)
    try:
        up.start()
        up.json("model", "push", files / "whole.gguf", "--name", REGISTERED, "--version", "1.0.0")
        up.json("blueprint", "apply", files / "blueprint.yaml")
        with up.frozen("optimizer"):  # it would only find out, one after the other, that these are no models
            yield up
    finally:
        up.stop(signal.SIGKILL)  # what it started dies with it


def versions(up: Up) -> list[tuple[str, str]]:
    return [(v["model"], v["version"]) for v in up.json("model", "ls")["versions"]]


def assert_told(done: Done, exit_code: int, code: str, where: str) -> None:
    """What, where and what to do, as JSON on stderr; nothing on stdout."""
    assert (done.exit_code, done.out) == (exit_code, ""), done.err
    problem = done.problem
    assert problem["code"] == code, problem
    assert where in f"{problem['what']} {problem['where']}", problem
    assert problem["fix"], problem


PUSHES = [
    ("text.gguf", "m", "1.0.0", WRONG_INPUT, "not_a_model", "text.gguf"),
    ("cut.gguf", "m", "1.0.0", WRONG_INPUT, "truncated_model", "cut.gguf"),
    ("mamba.gguf", "m", "1.0.0", WRONG_INPUT, "unsupported_architecture", "mamba.gguf"),
    ("no-tokenizer", "m", "1.0.0", WRONG_INPUT, "invalid_model", "no-tokenizer"),
    ("whole.gguf", "Bad Name", "1.0.0", WRONG_INPUT, "invalid_name", "Bad Name"),
    ("whole.gguf", "m", "1.0", WRONG_INPUT, "invalid_version", "1.0"),
    ("absent.gguf", "m", "1.0.0", 1, "not_found", "absent.gguf"),
    ("other.gguf", REGISTERED, "1.0.0", 1, "already_exists", f"{REGISTERED}:1.0.0"),
]


@pytest.mark.parametrize(("file", "name", "version", "exit_code", "code", "where"), PUSHES, ids=lambda v: str(v))
def test_a_push_that_is_wrong_registers_nothing(
    up: Up, files: Path, file: str, name: str, version: str, exit_code: int, code: str, where: str
) -> None:
    done = up("model", "push", files / file, "--name", name, "--version", version, "--json")
    assert_told(done, exit_code, code, where)
    assert versions(up) == [(REGISTERED, "1.0.0")]


def test_a_golden_prompt_that_is_wrong_is_named_by_its_line_to_people_and_machines(up: Up, files: Path) -> None:
    arguments = ("model", "push", files / "whole.gguf", "--name", "m", "--version", "1.0.0")
    arguments = (*arguments, "--golden", files / "golden.jsonl")
    person, machine = up(*arguments), up(*arguments, "--json")
    assert_told(machine, WRONG_INPUT, "invalid_message", "golden.jsonl line 2")
    problem = machine.problem
    assert (person.exit_code, person.out) == (WRONG_INPUT, "")
    assert person.err.splitlines() == [
        f"error [invalid_message]: {problem['what']}",
        f"  where: {problem['where']}",
        f"  fix:   {problem['fix']}",
    ]
    assert versions(up) == [(REGISTERED, "1.0.0")]


ASKED = [
    ("model show nobody", 1, "not_found", "nobody"),
    ("rollout start nobody", 1, "not_found", "nobody"),
    ("rollout start edge-chat", 1, "not_found", "tiny"),
    ("rollout start edge-chat --version 9.9.9", 1, "not_found", "9.9.9"),
    ("rollout pause edge-chat", 1, "not_found", "edge-chat"),
    ("rollout watch nobody", 1, "not_found", "nobody"),
    ("gateway show nobody", 1, "not_found", "nobody"),
    ("dlq replay 4711", 1, "not_found", "4711"),
    ("blueprint apply misspelt.yaml", WRONG_INPUT, "invalid_message", "stagess"),
    ("blueprint apply tab.yaml", WRONG_INPUT, "invalid_message", "line 2"),
    ("blueprint apply profile.yaml", 1, "not_found", "mainframe"),
]


@pytest.mark.parametrize(("words", "exit_code", "code", "where"), ASKED, ids=lambda v: str(v))
def test_what_is_asked_of_something_that_is_not_there(
    up: Up, files: Path, words: str, exit_code: int, code: str, where: str
) -> None:
    arguments = [files / word if word.endswith(".yaml") else word for word in words.split()]
    assert_told(up(*arguments, "--json"), exit_code, code, where)


def test_no_wrong_input_left_a_trace(up: Up) -> None:
    assert versions(up) == [(REGISTERED, "1.0.0")]
    assert up.json("rollout", "ls")["rollouts"] == []
    assert [(view["spec"]["name"], view["revision"]) for view in up.json("blueprint", "ls")["blueprints"]] == [
        ("edge-chat", 1)
    ]
    assert {state["restarts"] for state in up.processes().values()} == {0}


# ---- what is pushed does not arrive whole -----------------------------------------------------------------


def test_bytes_that_are_not_what_was_named_are_refused(up: Up) -> None:
    named, sent = b"what was named", b"what was sent!"
    file = ModelFile(path="m.gguf", digest=digest_of(named), size_bytes=len(named))
    before = versions(up)

    async def lie() -> None:
        client = await BusClient.connect(find(up.data), name="liar")
        begun = BeginUpload(model="lie", version="1.0.0", files=(file,))
        ticket = await client.request(begun)
        async with httpx.AsyncClient(verify=client.verify) as http:
            (await http.put(ticket.urls[file.digest], content=sent)).raise_for_status()
        about = {"upload": ticket.upload, "format": "gguf", "architecture": "llama"}
        with pytest.raises(DigestMismatch, match=digest_of(sent)):
            await client.request(RegisterVersion(model="lie", version="1.0.0", files=(file,), **about))
        assert file.digest in (await client.request(begun)).urls, "the lie is not stored under the digest"
        await client.close()

    asyncio.run(lie())
    assert versions(up) == before


def large_gguf(files: Path, path: Path) -> Path:
    """More than the sockets between us and a store that hangs take in; other bytes for each name."""
    shutil.copy(files / "whole.gguf", path)
    with path.open("r+b") as file:
        file.seek(1 << 20)
        file.write(path.name.encode())
        file.truncate(LARGE_BYTES)
    return path


@pytest.mark.slow
def test_a_store_that_hangs_is_said_soon_and_no_push_leaves_a_half(up: Up, files: Path, tmp_path: Path) -> None:
    names = ("interrupted", "killed", "waiting")
    pushes = {
        name: ("model", "push", large_gguf(files, tmp_path / f"{name}.gguf"), "--name", name, "--version", "1.0.0")
        for name in names
    }
    before = versions(up)
    for name, number, code in (("interrupted", signal.SIGINT, 130), ("killed", signal.SIGKILL, -signal.SIGKILL)):
        pushing = up.begin(*pushes[name])
        assert pushing.stderr
        while not pushing.stderr.readline().startswith("upload"):
            assert pushing.poll() is None
        with up.frozen("s3"):  # else it could be done before we are
            pushing.send_signal(number)
            assert ended(pushing, AT_ONCE_S).exit_code == code
            assert versions(up) == before, "what needs no S3 goes on"
    with up.frozen("s3"):
        assert_told(up(*pushes["waiting"], "--json", within_s=AT_ONCE_S), NOT_NOW, "unreachable", s3(up))
    assert versions(up) == before
    again = [up.begin(*arguments) for arguments in pushes.values()]
    assert [ended(pushing).exit_code for pushing in again] == [0, 0, 0]
    assert sorted(versions(up)) == sorted([*before, *((name, "1.0.0") for name in names)])


# ---- what a command needs is not there --------------------------------------------------------------------


def s3(up: Up) -> str:
    return f"127.0.0.1:{up.port('s3.api')}"


def test_a_store_that_is_gone_is_said_soon_and_a_repetition_succeeds(up: Up, tmp_path: Path) -> None:
    arguments = ("model", "push", make_gguf(tmp_path / "m.gguf", rows=7), "--name", "refused", "--version", "1.0.0")
    with up.unsupervised():  # nobody restarts it
        up.signal("s3", signal.SIGKILL)
        assert_told(up(*arguments, "--json", within_s=AT_ONCE_S), NOT_NOW, "unreachable", s3(up))
        assert ("refused", "1.0.0") not in versions(up)
    until(lambda: up(*arguments).exit_code == 0)
    assert ("refused", "1.0.0") in versions(up)


@pytest.fixture
def nobody() -> Iterator[int]:
    """A port on which nobody listens, and nobody else will."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def mute() -> Iterator[int]:
    """A port on which somebody listens who says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_nats_that_does_not_answer_is_said_soon(nobody: int, mute: int) -> None:
    urls = [f"nats://127.0.0.1:{port}" for port in (nobody, mute)]
    calls = [begin("model", "ls", "--json", SLMOPS_NATS_URL=url) for url in urls]
    for url, call in zip(urls, calls, strict=True):
        assert_told(ended(call, AT_ONCE_S), NOT_NOW, "unreachable", url)


# ---- a system that cannot start ---------------------------------------------------------------------------


def test_a_port_that_is_taken_is_named_and_nothing_runs(tmp_path: Path, mute: int) -> None:
    done = ended(begin("up", "--data", tmp_path / "data", "--nats-port", str(mute)), AT_ONCE_S)
    assert done.exit_code == 1
    assert f"error [port_taken]: port {mute}" in done.err
    assert "fix:" in done.err
    assert not (tmp_path / "data" / "state.json").exists(), "no process was started"


def test_a_port_that_is_none_is_wrong_usage(tmp_path: Path) -> None:
    done = ended(begin("up", "--data", tmp_path / "data", "--nats-port", "70000"), AT_ONCE_S)
    assert done.exit_code == WRONG_USAGE
    assert "--nats-port" in done.err


def test_one_system_per_folder(up: Up) -> None:
    done = up("up", within_s=AT_ONCE_S)
    assert done.exit_code == NOT_NOW
    assert "error [conflict]: another slmops uses this data folder" in done.err
    assert str(up.data) in done.err
    assert up("model", "ls").exit_code == 0, "the first one goes on"


def test_a_data_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments in (["up"], ["model", "ls"]):
        done = ended(begin(*arguments, "--data", tmp_path / "file" / "data"), AT_ONCE_S)
        assert done.exit_code == NOT_PERMITTED, done.err
        assert "error [denied]" in done.err
        assert str(tmp_path / "file") in done.err
