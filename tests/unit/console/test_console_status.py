"""`slmops status` and `slmops doctor` on a data folder: what they read, and the fix of each finding."""

from __future__ import annotations

import fcntl
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from unit.console.console_examples import NOW, nothing_set_up, slmops

from slmops.console.commands.status import findings, local_status
from slmops.console.render.status_view import BacklogView, DiskView, ExpiryView, LocalStatus, ProcessView, Status
from slmops.contracts.errors import InvalidMessage, Problem
from slmops.contracts.identity import ServiceProcess
from slmops.local.certificates import Certificates
from slmops.local.process import ProcessState
from slmops.local.supervisor import Supervisor

DISK = DiskView(free_bytes=50 << 30, size_bytes=100 << 30)
READY = ProcessView(name="registry", status="ready", log="logs/registry.log", pid=7, since=NOW)
HEALTHY = LocalStatus(data="/data", running=True, processes=(READY,), disk=DISK)
RESTARTING = READY.model_copy(update={"status": "restarting", "restarts": 5, "last_error": "no space"})


def local(**changes: Any) -> Status:
    return Status(version="0.1.0", local=HEALTHY.model_copy(update=changes), dead_letters=0)


def expiring(days: int) -> tuple[ExpiryView, ...]:
    return (ExpiryView(role="root", expires=NOW + timedelta(days=days)),)


def running(service: str, shared_revision: str) -> ServiceProcess:
    code = {"version": "0.1.0", "revision": "0", "shared_revision": shared_revision}
    return ServiceProcess(service=service, host="box", pid=1, started_at=NOW, **code)


@pytest.mark.parametrize(
    ("status", "kind", "what", "fix"),
    [
        (local(running=False), "not_running", "not running", "slmops up --data /data"),
        (local(processes=(RESTARTING,)), "process", "restarting after 5 restarts: no space", "logs/registry.log"),
        (local(disk=DiskView(free_bytes=300 << 20, size_bytes=1 << 40)), "disk", "300MiB free", "slmops storage gc"),
        (local(expiry=expiring(59)), "expiry", "2026-04-29", "slmops trust rotate root --keep-keys"),
        (local(expiry=expiring(-1)), "expiry", "2026-02-28", "slmops trust rotate root --keep-keys"),
        (local(certificates=expiring(20)), "certificate", "2026-03-21", "slmops up --data /data"),
        (local(readable_keys=("/data/keys/a.pem",)), "key", "other users can read", "chmod 600 /data/keys/a.pem"),
        (
            Status(version="1", problem=Problem(code="unreachable", what="NATS does not answer", fix="Start it")),
            "unreachable",
            "NATS does not answer",
            "Start it",
        ),
        (
            Status(version="1", backlog=(BacklogView(stream="EVENTS", consumer="rollout-x", pending=1000),)),
            "backlog",
            "1,000 messages",
            "Check that rollout runs",
        ),
        (
            Status(version="1", shared_revision="b", services=(running("registry", "a"), running("optimizer", "b"))),
            "mixed_releases",
            "2 releases run: 0.1.0 (a): registry; 0.1.0 (b): optimizer",
            "Restart the services",
        ),
        (
            Status(version="1", shared_revision="b", services=(running("registry", "a"),)),
            "mixed_releases",
            "the command line has revision b, the services have a",
            "Use the release of the services",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_each_finding_has_its_fix(status: Status, kind: str, what: str, fix: str) -> None:
    (found,) = findings(status, NOW)
    assert found.kind == kind
    assert what in found.what
    assert fix in found.fix


def test_a_healthy_system_has_no_findings() -> None:
    few = (BacklogView(stream="EVENTS", consumer="rollout-x", pending=999),)
    assert (
        findings(local(expiry=expiring(61), certificates=expiring(22)).model_copy(update={"backlog": few}), NOW) == []
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder as the supervisor writes it, with a lock that nobody holds."""
    supervisor = Supervisor(tmp_path / "state.json")

    class Child:
        state = ProcessState("registry", "ready", "logs/registry.log", pid=7, last_error=None)

    supervisor._children["registry"] = Child()  # type: ignore[assignment]
    supervisor._changed("registry")
    (tmp_path / "lock").touch()
    (tmp_path / "client.json").write_text(json.dumps({"nats_url": "nats://127.0.0.1:1"}))
    return tmp_path


def test_the_processes_of_a_killed_supervisor_are_stopped(data: Path) -> None:
    found = local_status(data)
    assert found
    assert (found.running, found.processes[0].status, found.processes[0].pid) == (False, "stopped", None)
    with (data / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = local_status(data)
    assert found
    assert (found.running, found.processes[0].status, found.processes[0].pid) == (True, "ready", 7)


def test_keys_that_others_can_read_are_found(data: Path) -> None:
    (data / "keys").mkdir()
    for name, mode in (("package-signing.pem", 0o644), ("package-trusted.pem", 0o644), ("console.creds", 0o600)):
        (data / "keys" / name).touch()
        (data / "keys" / name).chmod(mode)
    found = local_status(data)
    assert found
    assert found.readable_keys == (str(data / "keys" / "package-signing.pem"),)


def test_a_folder_without_a_system_has_no_local_status(tmp_path: Path) -> None:
    assert local_status(tmp_path) is None
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InvalidMessage):
        local_status(tmp_path)


def test_without_a_bus_status_and_doctor_still_answer(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing_set_up(monkeypatch, tmp_path / "nowhere")
    monkeypatch.delenv("SLMOPS_NATS_URL")
    done = slmops("status", "--data", str(data), "--json")
    assert (done.exit_code, json.loads(done.stdout)["problem"]["code"]) == (0, "unreachable")
    shown = slmops("status", "--data", str(data)).stdout
    assert "registry" in shown
    assert "free of" in shown
    done = slmops("doctor", "--data", str(data), "--json")
    assert (done.exit_code, [item["kind"] for item in json.loads(done.stdout)]) == (1, ["not_running", "unreachable"])


def test_the_certificates_of_a_data_folder_are_shown_with_their_ends(data: Path) -> None:
    (data / "keys").mkdir()
    Certificates(data / "keys" / "tls").renew(NOW)
    found = local_status(data)
    assert found
    ends = {one.role: (one.expires - NOW).days for one in found.certificates}
    assert ends == {"authority": 3650, "http": 90, "nats": 90, "s3": 90}
    assert found.readable_keys == ()
