"""Every command has help with an example, and every wrong call ends in a typed error with its exit code."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_model import make_gguf
from unit.console.console_examples import nothing_set_up, slmops

from slmops.console import app as console
from slmops.contracts.errors import PortTaken

PUSH = ("--name", "tiny", "--version", "1.0.0")
EXPECTED = {
    "attention", "blueprint apply", "blueprint ls", "bundle export", "bundle import", "bundle results", "bundle show",
    "chat", "delta apply", "delta make", "delta stat", "dlq ls", "dlq replay", "dlq rm", "doctor", "eval show",
    "eval verify", "fleet summary",
    "gateway ls", "gateway move", "gateway re-enrol", "gateway revoke", "gateway rm",
    "gateway show", "job cancel", "job ls", "model alias", "model ls", "model push", "model retire",
    "model show", "optimize",
    "package export", "package image", "package ls", "package show", "package verify", "package withdraw",
    "recipe ls", "recipe passes", "recipe show", "rollout abort", "rollout history", "rollout ls", "rollout pause",
    "rollout resume", "rollout rollback", "rollout show", "rollout start", "rollout watch", "status", "storage gc",
    "storage usage", "storage verify", "stream accept", "stream ls", "stream resize",
    "trust ceremony", "trust lock", "trust revoke", "trust rotate", "trust show", "trust sign",
    "user add", "user ls", "user renew", "user revoke", "variant ls", "whoami",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing_set_up(monkeypatch, tmp_path / "nowhere")


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every command (not the groups) with the words that call it."""
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from leaves(child, (*path, name))
        else:
            yield (*path, name), child


COMMANDS = dict(leaves(typer.main.get_command(console.build())))


def test_all_expected_commands_exist() -> None:
    ours = {" ".join(path) for path, command in COMMANDS.items() if "--traceparent" in str(option_names(command))}
    assert ours == EXPECTED


def option_names(command: Any) -> list[str]:
    return [name for parameter in command.params for name in parameter.opts]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_an_example_and_the_example_parses(path: tuple[str, ...]) -> None:
    shown = slmops(*path, "--help")
    assert shown.exit_code == 0
    assert "Example: slmops" in shown.output
    command = COMMANDS[path]
    examples = re.findall(r"Example: (.+)", command.epilog or command.help)
    for example in examples:
        words = shlex.split(example.rpartition("| ")[2])
        command.make_context("slmops", behind(("slmops", *path), words))  # raises a usage error


def behind(path: tuple[str, ...], words: list[str]) -> list[str]:
    """Returns the words after the command's name. A group may have options before it."""
    rest = iter(words)
    assert all(name in rest for name in path)
    return list(rest)


@pytest.mark.parametrize("path", [tuple(name.split()) for name in sorted(EXPECTED)], ids=" ".join)
def test_every_command_has_the_common_options(path: tuple[str, ...]) -> None:
    assert {"--json", "--data", "--traceparent"} <= set(option_names(COMMANDS[path]))


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["model", "push", "{gguf}", "--name", "Smol LM", "--version", "1.0.0"], "invalid_name", 65),
        (["model", "push", "{gguf}", "--name", "smollm2", "--version", "v1"], "invalid_version", 65),
        (["model", "push", "{missing}", *PUSH], "not_found", 1),
        (["model", "push", "{text}", *PUSH], "not_a_model", 65),
        (["model", "push", "{truncated}", *PUSH], "truncated_model", 65),
        (["model", "push", "{foreign}", *PUSH], "unsupported_architecture", 65),
        (["model", "push", "{folder}", *PUSH], "not_a_model", 65),
        (["model", "push", "{gguf}", *PUSH, "--golden", "{missing}"], "not_found", 1),
        (["model", "push", "{gguf}", *PUSH, "--golden", "{gguf}"], "invalid_message", 65),
        (["model", "show", "smollm2:one"], "invalid_version", 65),
        (["rollout", "start", "edge_chat"], "invalid_name", 65),
        (["rollout", "start", "edge-chat", "--version", "new"], "invalid_version", 65),
        (["rollout", "watch", "Edge"], "invalid_name", 65),
        (["gateway", "show", "gw.1"], "invalid_name", 65),
        (["gateway", "ls", "--revoked", "--moving"], "invalid_message", 65),
        (["gateway", "revoke", "gw.1"], "invalid_name", 65),
        (["gateway", "revoke", "gw-1", "--reason", "x" * 201], "invalid_message", 65),
        (["gateway", "rm", "gw.1"], "invalid_name", 65),
        (["gateway", "re-enrol", "gw-1", "--within", "soon"], "invalid_message", 65),
        (["gateway", "re-enrol", "gw-1", "--within", "31d"], "invalid_message", 65),
        (["gateway", "move", "gw-1", "--blueprint", "no!"], "invalid_name", 65),
        (["gateway", "revoke", "gw-1"], "unreachable", 75),
        (["blueprint", "apply", "{missing}"], "not_found", 1),
        (["blueprint", "apply", "{folder}"], "denied", 77),
        (["blueprint", "apply", "{text}"], "invalid_message", 65),
        (["dlq", "replay"], "invalid_message", 65),
        (["dlq", "replay", "17", "--all"], "invalid_message", 65),
        (["dlq", "rm"], "invalid_message", 65),
        (["dlq", "rm", "17", "--all"], "invalid_message", 65),
        (["model", "alias", "smollm2", "stable"], "invalid_version", 65),
        (["model", "alias", "smollm2:1.0.0", "Stable!"], "invalid_name", 65),
        (["model", "retire", "smollm2"], "invalid_version", 65),
        (["optimize", "smollm2"], "invalid_version", 65),
        (["optimize", "smollm2:1.0.0", "--recipe", "Int4"], "invalid_name", 65),
        (["optimize", "smollm2:1.0.0", "--recipe", "{missing}"], "not_found", 1),
        (["optimize", "smollm2:1.0.0", "--recipe", "{text}"], "invalid_recipe", 65),
        (["optimize", "smollm2:1.0.0", "--recipe", "{gguf}"], "invalid_recipe", 65),
        (["optimize", "smollm2:1.0.0", "--budget", "30m"], "invalid_message", 65),
        (["optimize", "smollm2:1.0.0", "--search", "--budget", "soon"], "invalid_message", 65),
        (["optimize", "smollm2:1.0.0", "--search", "--budget", "0s"], "invalid_message", 65),
        (["optimize", "smollm2:1.0.0"], "unreachable", 75),
        (["job", "cancel", "now"], "unreachable", 75),
        (["recipe", "show", "Int4"], "invalid_name", 65),
        (["eval", "show", "smollm2:1.0.0:int4:x"], "invalid_version", 65),
        (["eval", "verify", "smollm2"], "invalid_version", 65),
        (["eval", "verify", "smollm2:1.0.0"], "unreachable", 75),
        (["chat", "gw-1", "Who are", "you?"], "invalid_message", 65),
        (["chat", "Who are you?"], "not_found", 1),
        (["chat", "gw-1", "hi", "--url", "http://127.0.0.1:1"], "invalid_message", 65),
        (["chat", "hi", "--url", "127.0.0.1:1"], "unreachable", 75),
        (["chat", "hi", "--url", "http://[::1"], "unreachable", 75),
        (["trust", "show", "--folder", "{folder}"], "not_found", 1),
        (["trust", "sign", "--folder", "{folder}"], "not_found", 1),
        (["trust", "rotate", "boss", "--folder", "{folder}"], "invalid_message", 65),
        (["trust", "ceremony", "--folder", "{folder}", "--threshold", "4"], "invalid_message", 65),
        (["trust", "revoke", "smollm2", "--folder", "{folder}", "--key", "{text}"], "invalid_message", 65),
        (["trust", "revoke", "smollm2", "--folder", "{folder}", "--key", "{missing}"], "invalid_message", 65),
        (["model", "ls", "--data", "{folder}"], "not_found", 1),
        (["model", "ls"], "unreachable", 75),
        (["model", "push", "{gguf}", *PUSH], "unreachable", 75),
        (["package", "image", "{missing}", "--key", "{text}", "--root", "{text}"], "not_found", 1),
        (["package", "image", "{folder}", "--key", "{text}", "--root", "{text}"], "signature_invalid", 1),
        (
            ["package", "image", "{folder}", "--key", "{text}", "--root", "{text}", "--blueprint", "{text}"],
            "invalid_message",
            65,
        ),
        (["storage", "gc", "--grace", "a week"], "invalid_message", 65),
        (["storage", "gc", "--dry-run"], "unreachable", 75),
        (["stream", "ls"], "unreachable", 75),
        (["stream", "resize", "EVENTS", "much"], "invalid_message", 65),
        (["stream", "resize", "EVENTS", "2GiB"], "unreachable", 75),
        (["attention"], "unreachable", 75),
    ],
)
def test_a_wrong_call_ends_in_a_typed_error(tmp_path: Path, arguments: list[str], code: str, exit_code: int) -> None:
    files = {name: tmp_path / f"{name}.gguf" for name in ("gguf", "missing", "text", "truncated", "foreign", "folder")}
    make_gguf(files["gguf"])
    make_gguf(files["foreign"], architecture="mamba")
    files["truncated"].write_bytes(files["gguf"].read_bytes()[:-1])
    files["text"].write_text("a: [b")
    files["folder"].mkdir()
    given = [argument.format(**files) for argument in arguments]

    with_json = slmops(*given, "--json")
    assert with_json.exit_code == exit_code
    assert with_json.stdout == ""
    problem = json.loads(with_json.stderr)
    assert problem["code"] == code

    as_text = slmops(*given)
    assert as_text.exit_code == exit_code
    assert f"error [{code}]: {problem['what']}" in as_text.stderr
    assert (f"where: {problem['where']}" in as_text.stderr) is bool(problem["where"])
    assert (f"fix:   {problem['fix']}" in as_text.stderr) is bool(problem["fix"])
    assert "Traceback" not in as_text.stderr


def test_the_error_for_a_bad_golden_prompt_names_file_and_line(tmp_path: Path) -> None:
    golden = tmp_path / "prompts.jsonl"
    golden.write_text('{"prompt": "Capital of France?", "expect": ["Paris"]}\n\n{"prompt": "2+2?", "expect": []}\n')
    done = slmops("model", "push", str(make_gguf(tmp_path / "m.gguf")), *PUSH, "--golden", str(golden), "--json")
    assert done.exit_code == 65
    assert json.loads(done.stderr)["where"] == f"{golden} line 3"


def test_an_empty_file_of_golden_prompts_is_rejected(tmp_path: Path) -> None:
    golden = tmp_path / "prompts.jsonl"
    golden.write_text("\n\n")
    done = slmops("model", "push", str(make_gguf(tmp_path / "m.gguf")), *PUSH, "--golden", str(golden), "--json")
    assert (done.exit_code, json.loads(done.stderr)["code"]) == (65, "invalid_message")


def test_the_error_for_a_wrong_blueprint_names_every_wrong_field() -> None:
    text = "name: Edge Chat\nmodel: smollm2\nstages:\n  - name: canary\n    percent: 200\ncolour: red\n"
    done = slmops("blueprint", "apply", "-", "--json", stdin=text)
    problem = json.loads(done.stderr)
    assert (done.exit_code, problem["where"]) == (65, "standard input")
    for field in ("name:", "stages.0.percent:", "colour:"):
        assert field in problem["what"]


def test_wrong_usage_exits_with_2() -> None:
    assert slmops("rollout", "start").exit_code == 2
    assert slmops("model", "push", "x", "--name", "n").exit_code == 2
    assert slmops("no-such-command").exit_code == 2


def test_commands_of_other_distributions_are_added_and_report_errors_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("listen", "test_console_commands:listen", console.PLUGINS)
    monkeypatch.setattr(console, "entry_points", lambda group: [entry] if group == console.PLUGINS else [])
    monkeypatch.setattr(EntryPoint, "load", lambda _: listen)
    done = slmops("listen", "--port", "80", app=console.build())
    assert done.exit_code == PortTaken.exit_code
    assert "error [port_taken]: port 80 is taken" in done.stderr
    assert "Example: slmops listen" in slmops("listen", "--help", app=console.build()).output


def listen(port: int = 1) -> None:
    """Listen on a port.

    Example: slmops listen
    """
    raise PortTaken(f"port {port} is taken")
