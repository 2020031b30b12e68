"""Bad input and faults from a user's view: the error says what, where and what to do; no partial state is left."""

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
from up import CommandResult, Up, begin, until, wait_for_exit

from slmops.console.settings import find
from slmops.contracts.commands import BeginUpload, RegisterVersion
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import DigestMismatch
from slmops.contracts.model import ModelFile
from slmops.kit.bus.client import BusClient

REGISTERED = "known"
BLUEPRINT = "name: edge-chat\nmodel: tiny\n"
FAILS_WITHIN_S = 60  # about 6 on a quiet machine; without a limit of its own the command would never end
WRONG_USAGE = 2
WRONG_INPUT = 65
TEMPORARY_FAILURE = 75
NOT_PERMITTED = 77
LARGE_BYTES = 20 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes models, blueprints and golden prompts that are valid, or invalid in one way each."""
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
    """Yields a system with one version, which is not a usable model, and one blueprint without a package."""
    up = Up(tmp_path_factory.mktemp("faults") / "data", gateways=0)
    try:
        up.start()
        up.json("model", "push", files / "whole.gguf", "--name", REGISTERED, "--version", "1.0.0")
        up.json("blueprint", "apply", files / "blueprint.yaml")
        with up.frozen("optimizer"):  # it would try to optimize each version and fail
            yield up
    finally:
        up.stop(signal.SIGKILL)  # its child processes are killed with it


def versions(up: Up) -> list[tuple[str, str]]:
    return [(v["model"], v["version"]) for v in up.json("model", "ls")["versions"]]


def assert_error(done: CommandResult, exit_code: int, code: str, where: str) -> None:
    """Asserts that stderr holds a JSON error that says what, where and what to do, and that stdout is empty."""
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
def test_an_invalid_push_reports_an_error_and_registers_nothing(
    up: Up, files: Path, file: str, name: str, version: str, exit_code: int, code: str, where: str
) -> None:
    done = up("model", "push", files / file, "--name", name, "--version", version, "--json")
    assert_error(done, exit_code, code, where)
    assert versions(up) == [(REGISTERED, "1.0.0")]


def test_an_invalid_golden_prompt_is_reported_with_its_line_as_text_and_as_json(up: Up, files: Path) -> None:
    arguments = ("model", "push", files / "whole.gguf", "--name", "m", "--version", "1.0.0")
    arguments = (*arguments, "--golden", files / "golden.jsonl")
    text, as_json = up(*arguments), up(*arguments, "--json")
    assert_error(as_json, WRONG_INPUT, "invalid_message", "golden.jsonl line 2")
    problem = as_json.problem
    assert (text.exit_code, text.out) == (WRONG_INPUT, "")
    assert text.err.splitlines() == [
        f"error [invalid_message]: {problem['what']}",
        f"  where: {problem['where']}",
        f"  fix:   {problem['fix']}",
    ]
    assert versions(up) == [(REGISTERED, "1.0.0")]


REQUESTS = [
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


@pytest.mark.parametrize(("words", "exit_code", "code", "where"), REQUESTS, ids=lambda v: str(v))
def test_a_command_with_an_invalid_or_unknown_argument_reports_an_error(
    up: Up, files: Path, words: str, exit_code: int, code: str, where: str
) -> None:
    arguments = [files / word if word.endswith(".yaml") else word for word in words.split()]
    assert_error(up(*arguments, "--json"), exit_code, code, where)


def test_invalid_input_changes_no_state_and_restarts_no_process(up: Up) -> None:
    assert versions(up) == [(REGISTERED, "1.0.0")]
    assert up.json("rollout", "ls")["rollouts"] == []
    assert [(view["spec"]["name"], view["revision"]) for view in up.json("blueprint", "ls")["blueprints"]] == [
        ("edge-chat", 1)
    ]
    assert {state["restarts"] for state in up.processes().values()} == {0}


# ---- pushes that fail or are interrupted ------------------------------------------------------------------


def test_uploaded_content_with_another_digest_is_refused(up: Up) -> None:
    named, sent = b"announced data", b"uploaded data!"
    file = ModelFile(path="m.gguf", digest=digest_of(named), size_bytes=len(named))
    before = versions(up)

    async def push_other_content() -> None:
        client = await BusClient.connect(find(up.data), name="test")
        begun = BeginUpload(model="mismatch", version="1.0.0", files=(file,))
        ticket = await client.request(begun)
        async with httpx.AsyncClient(verify=client.verify) as http:
            (await http.put(ticket.urls[file.digest], content=sent)).raise_for_status()
        about = {"upload": ticket.upload, "format": "gguf", "architecture": "llama"}
        with pytest.raises(DigestMismatch, match=digest_of(sent)):
            await client.request(RegisterVersion(model="mismatch", version="1.0.0", files=(file,), **about))
        assert file.digest in (await client.request(begun)).urls, "the other content is not stored under the digest"
        await client.close()

    asyncio.run(push_other_content())
    assert versions(up) == before


def large_gguf(files: Path, path: Path) -> Path:
    """Writes a file larger than the socket buffers before a store that hangs, with different content for each name."""
    shutil.copy(files / "whole.gguf", path)
    with path.open("r+b") as file:
        file.seek(1 << 20)
        file.write(path.name.encode())
        file.truncate(LARGE_BYTES)
    return path


@pytest.mark.slow
def test_a_push_to_a_hanging_store_fails_soon_and_leaves_no_partial_version(
    up: Up, files: Path, tmp_path: Path
) -> None:
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
        with up.frozen("s3"):  # otherwise the push could end before the signal arrives
            pushing.send_signal(number)
            assert wait_for_exit(pushing, FAILS_WITHIN_S).exit_code == code
            assert versions(up) == before, "commands that need no S3 still work"
    with up.frozen("s3"):
        done = up(*pushes["waiting"], "--json", within_s=FAILS_WITHIN_S, SLMOPS_UPLOAD_PATIENCE="PT1S")
        assert_error(done, TEMPORARY_FAILURE, "store_unreachable", s3(up))
    assert versions(up) == before
    again = [up.begin(*arguments) for arguments in pushes.values()]
    assert [wait_for_exit(pushing).exit_code for pushing in again] == [0, 0, 0]
    assert sorted(versions(up)) == sorted([*before, *((name, "1.0.0") for name in names)])


# ---- servers that are not reachable -----------------------------------------------------------------------


def s3(up: Up) -> str:
    return f"127.0.0.1:{up.port('s3.api')}"


def test_a_push_to_a_stopped_store_fails_soon_and_succeeds_after_its_restart(up: Up, tmp_path: Path) -> None:
    arguments = ("model", "push", make_gguf(tmp_path / "m.gguf", rows=7), "--name", "refused", "--version", "1.0.0")
    with up.unsupervised():
        up.signal("s3", signal.SIGKILL)
        done = up(*arguments, "--json", within_s=FAILS_WITHIN_S, SLMOPS_UPLOAD_PATIENCE="PT1S")
        assert_error(done, TEMPORARY_FAILURE, "store_unreachable", s3(up))
        assert ("refused", "1.0.0") not in versions(up)
    until(lambda: up(*arguments).exit_code == 0)
    assert ("refused", "1.0.0") in versions(up)


@pytest.fixture
def unused_port() -> Iterator[int]:
    """Yields a port that no process listens on; it stays reserved for the test."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Yields a port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_an_unreachable_or_silent_nats_server_is_reported_soon(unused_port: int, silent_port: int) -> None:
    urls = [f"nats://127.0.0.1:{port}" for port in (unused_port, silent_port)]
    calls = [begin("model", "ls", "--json", SLMOPS_NATS_URL=url) for url in urls]
    for url, call in zip(urls, calls, strict=True):
        assert_error(wait_for_exit(call, FAILS_WITHIN_S), TEMPORARY_FAILURE, "unreachable", url)


# ---- a system that cannot start ---------------------------------------------------------------------------


def test_up_with_a_taken_port_names_the_port_and_starts_no_process(tmp_path: Path, silent_port: int) -> None:
    done = wait_for_exit(begin("up", "--data", tmp_path / "data", "--nats-port", str(silent_port)), FAILS_WITHIN_S)
    assert done.exit_code == 1
    assert f"error [port_taken]: port {silent_port}" in done.err
    assert "fix:" in done.err
    assert not (tmp_path / "data" / "state.json").exists(), "no process was started"


def test_up_with_an_invalid_port_number_is_a_usage_error(tmp_path: Path) -> None:
    done = wait_for_exit(begin("up", "--data", tmp_path / "data", "--nats-port", "70000"), FAILS_WITHIN_S)
    assert done.exit_code == WRONG_USAGE
    assert "--nats-port" in done.err


def test_a_second_system_on_the_same_data_folder_is_refused(up: Up) -> None:
    done = up("up", within_s=FAILS_WITHIN_S)
    assert done.exit_code == TEMPORARY_FAILURE
    assert "error [conflict]: another slmops uses this data folder" in done.err
    assert str(up.data) in done.err
    assert up("model", "ls").exit_code == 0, "the first system still works"


def test_an_unusable_data_folder_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments in (["up"], ["model", "ls"]):
        done = wait_for_exit(begin(*arguments, "--data", tmp_path / "file" / "data"), FAILS_WITHIN_S)
        assert done.exit_code == NOT_PERMITTED, done.err
        assert "error [denied]" in done.err
        assert str(tmp_path / "file") in done.err
