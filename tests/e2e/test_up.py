"""`slmops up`: rollouts by hand, a full disk, a restart, and a gateway without a network.

The tests depend on each other and run in the order of this file.
"""

from __future__ import annotations

import json
import os
import signal
import string
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from servers import QUICK
from tiny_model import make_tiny_llama
from up import CommandResult, Up, until

from slmops.local.environment import default_gateways, gateway_spec
from slmops.local.layout import Layout

CANARY, OTHER = "gw-1", "gw-2"
MODEL, BLUEPRINT = "tiny", "edge-chat"
SPEC = f"""
name: {BLUEPRINT}
model: {MODEL}
soak: {{seconds: 0.5, golden_every_s: 0.1}}
telemetry: {{every_s: 0.5}}
"""
ONE_VARIANT = {"SLMOPS_RECIPES": '["int8"]', "SLMOPS_ANCHOR": "false"}
"""Makes one variant only: these tests are not about the choice of a variant."""
IN_PROGRESS = 1
NOT_COMPLETED = 3


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yields a data folder whose canary has its own small disk to be filled; without root it is a plain folder."""
    data = tmp_path_factory.mktemp("up") / "data"
    home = data / CANARY
    home.mkdir(parents=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", home], capture_output=True)
    try:
        yield data
    finally:
        if mount.returncode == 0:
            subprocess.run(["umount", "--lazy", home], check=True)


@pytest.fixture(scope="module")
def up(small_disk: Path) -> Iterator[Up]:
    """Yields a system with 1.0.0 rolled out to two gateways, and 1.1.0, with other weights, packaged."""
    files = small_disk.parent
    system = Up(small_disk, gateways=2, **QUICK, **ONE_VARIANT)
    try:
        system.start()
        push(system, files, "1.0.0", seed=0, wait=True)
        push(system, files, "1.1.0", seed=5, wait=False)
        (files / "blueprint.yaml").write_text(SPEC)
        system.json("blueprint", "apply", files / "blueprint.yaml")
        assert roll_out(system, "1.0.0").exit_code == 0
        push(system, files, "1.1.0", seed=5, wait=True)
        yield system
    finally:
        system.stop()


def push(up: Up, files: Path, version: str, seed: int, wait: bool) -> None:
    source, golden = files / version, files / f"{version}.jsonl"
    if not source.exists():
        make_tiny_llama(source, seed)
        any_text = list(
            string.ascii_letters + string.digits + string.punctuation + "\ufffd"
        )  # a random model answers at random
        golden.write_text(json.dumps({"prompt": "hello", "expect": any_text, "max_tokens": 24}) + "\n")
    arguments = ("--name", MODEL, "--version", version, "--golden", golden)
    up.json("model", "push", source, *arguments, *(["--wait"] if wait else []), within_s=90)


def roll_out(up: Up, version: str) -> CommandResult:
    up.json("rollout", "start", BLUEPRINT, "--version", version)
    return up("rollout", "watch", BLUEPRINT)


def rollout(up: Up) -> dict[str, Any]:
    return dict(up.json("rollout", "ls", BLUEPRINT)["rollouts"][-1])


def gateway(up: Up, name: str) -> dict[str, Any]:
    return dict(up.json("gateway", "show", name))


def running(up: Up) -> dict[str, str]:
    return {view["gateway_id"]: view["running_version"] for view in up.json("gateway", "ls")["gateways"]}


def answer(url: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    response.raise_for_status()
    return dict(response.json())


def api(up: Up, name: str) -> str:
    return f"http://127.0.0.1:{up.port(f'{name}.api')}"


# ---- an operator's commands -------------------------------------------------------------------------------


def test_chat_answers_and_gateway_show_names_the_running_release(up: Up) -> None:
    for name in (CANARY, OTHER):
        reply = up.json("chat", name, "hello", "--max-tokens", "4")
        assert reply["text"]
        assert reply["model"] == answer(api(up, name))["model"]
    shown = gateway(up, CANARY)
    assert (shown["running_version"], shown["phase"], shown["problem"]) == ("1.0.0", "committed", None)
    assert shown["desired"] == shown["running"]
    assert "plan" in shown["desired_because"]["release"]
    assert up("gateway", "show", CANARY).out.count("1.0.0") == 1


@pytest.fixture
def full_disk(up: Up) -> Iterator[Path]:
    """Yields a file that fills the canary's disk completely; removing it frees the disk."""
    home = up.data / CANARY
    if not os.path.ismount(home):
        pytest.skip("mounting a small disk needs root")
    filler = home / "filler"
    with filler.open("wb", buffering=0) as out, suppress(OSError):
        while out.write(bytes(4096)):
            pass
    assert psutil.disk_usage(str(home)).free == 0
    yield filler
    filler.unlink(missing_ok=True)


def test_a_gateway_with_a_full_disk_reports_it_keeps_serving_and_updates_after_space_is_freed(
    up: Up, full_disk: Path
) -> None:
    up.json("rollout", "start", BLUEPRINT, "--version", "1.1.0")
    until(lambda: (gateway(up, CANARY)["problem"] or {}).get("code") == "disk_full", within_s=30)
    problem = gateway(up, CANARY)["problem"]
    assert CANARY in problem["where"]
    assert problem["fix"]
    assert answer(api(up, CANARY)), "it still serves the installed release"
    assert up.processes()[CANARY]["restarts"] == 0

    up.signal(CANARY, signal.SIGKILL)
    until(lambda: up.processes()[CANARY]["restarts"] == 1)
    until(lambda: serves(api(up, CANARY)), within_s=30)
    assert running(up) == {CANARY: "1.0.0", OTHER: "1.0.0"}

    full_disk.unlink()
    assert up("rollout", "watch", BLUEPRINT).exit_code == 0
    assert running(up) == {CANARY: "1.1.0", OTHER: "1.1.0"}
    assert gateway(up, CANARY)["problem"] is None
    assert up.processes()[CANARY]["restarts"] == 1


def test_a_completed_rollout_is_rolled_back_by_command(up: Up) -> None:
    assert running(up) == {CANARY: "1.1.0", OTHER: "1.1.0"}
    back = up.json("rollout", "rollback", BLUEPRINT, "--reason", "complaints from the field")
    assert (back["state"], back["reason"]) == ("rolled_back", "complaints from the field")
    until(lambda: running(up) == {CANARY: "1.0.0", OTHER: "1.0.0"}, within_s=30)
    assert up.json("blueprint", "ls")["blueprints"][0]["stable"]["version"] == "1.0.0"


@pytest.mark.slow
def test_a_rollout_is_paused_resumed_and_aborted(up: Up) -> None:
    with up.frozen(CANARY):  # otherwise the rollout could complete before the next command
        up.json("rollout", "start", BLUEPRINT, "--version", "1.1.0")
        again = up("rollout", "start", BLUEPRINT, "--version", "1.1.0", "--json")
        other = up("rollout", "start", BLUEPRINT, "--version", "1.0.0", "--json")
        assert [(done.exit_code, done.problem["code"]) for done in (again, other)] == [
            (IN_PROGRESS, "already_exists"),
            (IN_PROGRESS, "illegal_transition"),
        ]
        assert up.json("rollout", "pause", BLUEPRINT, "--reason", "lunch")["state"] == "paused"
    until(lambda: running(up)[CANARY] == "1.1.0" and gateway(up, CANARY)["phase"] == "committed", within_s=30)
    assert (rollout(up)["state"], running(up)[OTHER]) == ("paused", "1.0.0")
    with up.frozen(OTHER):
        assert up.json("rollout", "resume", BLUEPRINT)["state"] == "running"
        assert up.json("rollout", "abort", BLUEPRINT, "--reason", "wrong version")["state"] == "aborted"
    assert up("rollout", "watch", BLUEPRINT).exit_code == NOT_COMPLETED
    assert rollout(up)["reason"] == "wrong version"
    until(lambda: running(up) == {CANARY: "1.0.0", OTHER: "1.0.0"}, within_s=30)
    late = up("rollout", "resume", BLUEPRINT, "--json")
    assert (late.exit_code, late.problem["code"]) == (1, "illegal_transition")


# ---- stop and start ---------------------------------------------------------------------------------------


def listed(up: Up) -> dict[str, Any]:
    """Returns the state that must be the same after a restart."""
    gateways = ("gateway_id", "blueprint", "labels", "phase", "running", "running_version", "desired")
    return {
        "versions": up.json("model", "ls")["versions"],
        "rollouts": up.json("rollout", "ls")["rollouts"],
        "blueprints": up.json("blueprint", "ls")["blueprints"],
        "gateways": [{key: view[key] for key in gateways} for view in up.json("gateway", "ls")["gateways"]],
    }


def test_a_restart_keeps_all_state_and_downloads_nothing_again(up: Up) -> None:
    before = listed(up)
    answers = {name: answer(api(up, name))["system_fingerprint"] for name in (CANARY, OTHER)}
    processes = [state["pid"] for state in up.processes().values()]
    processes += [child.pid for pid in processes for child in psutil.Process(pid).children(recursive=True)]
    assert up.stop(signal.SIGTERM) == 0
    assert [pid for pid in processes if psutil.pid_exists(pid)] == []
    assert "Stopped." in up.output

    assert_gateway_serves_offline(up, answers[CANARY])

    up.start()
    assert {name: answer(api(up, name))["system_fingerprint"] for name in (CANARY, OTHER)} == answers
    until(lambda: listed(up) == before, within_s=10)
    assert 'subject="cmd.packager.fetch.' not in up.metrics("packager"), "nothing is downloaded again"


def assert_gateway_serves_offline(up: Up, release: str) -> None:
    """Asserts that the canary's process serves its release without a bus, a store or a supervisor."""
    ports = json.loads((up.data / "ports.json").read_text())
    spec = gateway_spec(Layout(up.data), ports, default_gateways()[0])
    with spec.log_path.open("ab") as log:
        alone = subprocess.Popen(list(spec.argv), env=dict(spec.env), cwd=spec.cwd, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{ports[f'{CANARY}.api']}"
        until(lambda: alone.poll() is not None or serves(url), within_s=30)
        assert answer(url)["system_fingerprint"] == release
    finally:
        alone.terminate()
        assert alone.wait(timeout=20) == 0


def serves(url: str) -> bool:
    try:
        return bool(answer(url))
    except httpx.HTTPError:
        return False


@pytest.mark.slow
def test_a_new_version_is_rolled_out_after_a_restart(up: Up) -> None:
    assert roll_out(up, "1.1.0").exit_code == 0
    assert running(up) == {CANARY: "1.1.0", OTHER: "1.1.0"}
    assert up.json("chat", OTHER, "hello", "--max-tokens", "4")["text"]
    assert up.json("dlq", "ls")["dead_letters"] == []


def test_a_revoked_gateway_is_disconnected_serves_on_and_stays_out_after_a_restart(up: Up) -> None:
    """The rollout service decides, the access service tells the server, and the gateway says why it has no network."""
    up.json("gateway", "revoke", OTHER, "--reason", "stolen")
    until(lambda: up.health_report(OTHER).get("refused", {}).get("code") == "credential_revoked")
    assert not up.health_report(OTHER)["connected"]
    assert answer(api(up, OTHER)), "it goes on serving its last good release"
    assert [gateway["gateway_id"] for gateway in up.json("gateway", "ls", "--revoked")["gateways"]] == [OTHER]
    actors = {entry["actor"] for entry in up.json("rollout", "history", BLUEPRINT)["entries"]}
    assert f"person:{up.json('whoami')['user']}" in actors

    up.stop()
    up.start()
    until(lambda: up.health_report(OTHER).get("refused", {}).get("code") == "credential_revoked")
    until(lambda: up.health_report(CANARY)["connected"])
