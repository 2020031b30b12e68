"""The supervisor restarts processes that crash, and stops every process when it stops itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from slmops.contracts.errors import NotFound, Unreachable
from slmops.local.process import ProcessSpec, ProcessState
from slmops.local.supervisor import Supervisor

GRACE = timedelta(milliseconds=500)
SLEEPER = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('up', 'w'); time.sleep(600)"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])
open('grandchild', 'w').write(str(child.pid))
time.sleep(600)
"""
SUPERVISOR_SCRIPT = """
import asyncio, sys
from pathlib import Path
from datetime import timedelta
from slmops.local.process import ProcessSpec
from slmops.local.signals import cancelled_by_signals
from slmops.local.supervisor import Supervisor

async def main(folder):
    with cancelled_by_signals():
        async with Supervisor(folder / 'state.json', grace=timedelta(milliseconds=500)) as supervisor:
            for name in ('sleeper', 'stubborn'):
                argv = [sys.executable, '-S', '-c', (folder / f'{name}.py').read_text()]
                await supervisor.start(ProcessSpec(name, argv, folder / f'{name}.log', cwd=folder))
            while not (folder / 'up').exists():
                await asyncio.sleep(.01)
            print('supervising', flush=True)
            await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1])))
"""


def script(folder: Path, name: str, code: str, ready: Path | None = None) -> ProcessSpec:
    async def exists() -> bool:
        assert ready
        return ready.exists()

    argv = [sys.executable, "-S", "-c", code]
    return ProcessSpec(name, argv, folder / "logs" / f"{name}.log", ready=exists if ready else None, cwd=folder)


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (another process: nothing to wait on)
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"


def state_of(folder: Path, name: str) -> dict[str, object]:
    processes = json.loads((folder / "state.json").read_text())["processes"]
    [found] = [process for process in processes if process["name"] == name]
    return dict(found)


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    async with Supervisor(tmp_path / "state.json", grace=GRACE) as supervisor:
        yield supervisor


async def test_a_killed_process_is_restarted_and_its_state_shows_the_restart(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    await supervisor.start(script(tmp_path, "a", SLEEPER))
    first = state_of(tmp_path, "a")
    assert (first["status"], first["restarts"]) == ("ready", 0)
    await supervisor.kill("a")
    await until(lambda: state_of(tmp_path, "a")["restarts"] == 1 and state_of(tmp_path, "a")["status"] == "ready")
    second = state_of(tmp_path, "a")
    assert second["last_exit"] == -signal.SIGKILL
    assert second["pid"] != first["pid"]
    assert not alive(int(str(first["pid"])))


async def test_a_process_that_keeps_crashing_is_restarted_with_increasing_delays(tmp_path: Path) -> None:
    crashes: list[float] = []

    def seen(state: ProcessState) -> None:
        if state.status == "restarting":
            crashes.append(time.monotonic())

    async with Supervisor(tmp_path / "state.json", seen, GRACE) as supervisor:
        await supervisor.start(script(tmp_path, "a", "raise SystemExit(3)"))
        await until(lambda: len(crashes) == 4)
        shown = state_of(tmp_path, "a")
    assert (shown["restarts"], shown["last_exit"]) == (4, 3)
    pauses = [b - a for a, b in pairwise(crashes)]
    assert pauses == sorted(pauses)
    assert [pause > least for pause, least in zip(pauses, (0.25, 0.5, 1.0), strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"level": "ERROR", "message": "stopped: [disk_full] no space"}', "stopped: [disk_full] no space"),
        ("ModuleNotFoundError: no nats", "ModuleNotFoundError: no nats"),
    ],
)
async def test_the_last_error_of_a_crashing_process_is_shown_until_it_is_ready(
    line: str, message: str, tmp_path: Path
) -> None:
    failing = "import sys, os; os.path.exists('repaired') or sys.exit(" + repr("started\n" + line) + ")"
    code = failing + "\n" + PARENT
    async with Supervisor(tmp_path / "state.json", grace=GRACE) as supervisor:
        await supervisor.start(script(tmp_path, "b", code))  # ready as soon as it runs
        await until(lambda: state_of(tmp_path, "b")["restarts"])
        assert state_of(tmp_path, "b")["last_error"] == message
        (tmp_path / "repaired").touch()
        await until(lambda: state_of(tmp_path, "b")["status"] == "ready" and not state_of(tmp_path, "b")["last_error"])


async def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "state.json", grace=GRACE)
    await supervisor.start(script(tmp_path, "stubborn", STUBBORN, tmp_path / "up"))
    [pid] = [state.pid for state in supervisor.states()]
    began = time.monotonic()
    await supervisor.stop()
    assert pid
    assert not alive(pid)
    assert time.monotonic() - began >= GRACE.total_seconds(), "the grace period was respected"
    assert (state_of(tmp_path, "stubborn")["status"], state_of(tmp_path, "stubborn")["last_exit"]) == ("stopped", -9)


async def test_the_child_processes_of_a_killed_process_are_killed(supervisor: Supervisor, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    await supervisor.start(script(tmp_path, "parent", PARENT, note))
    await until(lambda: note.read_text())
    grandchild = int(note.read_text())
    assert alive(grandchild)
    [parent] = [state.pid for state in supervisor.states()]
    assert parent
    os.kill(parent, signal.SIGKILL)  # only the parent: the supervisor kills the rest of its process group
    await until(lambda: not alive(grandchild))


async def test_processes_are_stopped_in_reverse_order(tmp_path: Path) -> None:
    stopped: list[str] = []
    async with Supervisor(
        tmp_path / "state.json", lambda s: stopped.append(s.name) if s.status == "stopped" else None, GRACE
    ) as supervisor:
        for name in ("a", "b", "c"):
            await supervisor.start(script(tmp_path, name, SLEEPER))
    assert stopped == ["c", "b", "a"]


async def test_a_process_that_exits_before_it_is_ready_is_an_error_with_its_log(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    spec = script(tmp_path, "bad", "raise SystemExit('no such model')", tmp_path / "never")
    with pytest.raises(Unreachable, match="no such model") as error:
        await supervisor.start(spec)
    assert error.value.where == str(spec.log_path)
    assert state_of(tmp_path, "bad")["status"] == "failed"


async def test_a_process_that_exits_with_a_temporary_failure_is_retried_during_start(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    code = "import os, time; os.path.exists('need') or exit((open('need', 'w').close(), 75)[1]); time.sleep(600)"

    async def second_try() -> bool:
        return supervisor.states()[0].restarts == 1

    spec = ProcessSpec("a", [sys.executable, "-c", code], tmp_path / "a.log", ready=second_try, cwd=tmp_path)
    await supervisor.start(spec)
    assert (state_of(tmp_path, "a")["restarts"], state_of(tmp_path, "a")["last_exit"]) == (1, 75)


async def test_a_program_that_does_not_exist_is_an_error(supervisor: Supervisor, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="No such file"):
        await supervisor.start(ProcessSpec("bad", ["/no/such/program"], tmp_path / "bad.log"))


async def test_a_process_that_never_becomes_ready_is_an_error_and_is_stopped(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    with pytest.raises(Unreachable, match="not ready after"):
        await supervisor.start(script(tmp_path, "slow", SLEEPER, tmp_path / "never"), timedelta(milliseconds=300))
    assert state_of(tmp_path, "slow")["pid"] is None


async def test_an_unexpected_exception_of_a_readiness_probe_is_raised(supervisor: Supervisor, tmp_path: Path) -> None:
    async def broken() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await supervisor.start(
            ProcessSpec("a", [sys.executable, "-c", SLEEPER], tmp_path / "a.log", ready=broken, cwd=tmp_path)
        )


async def test_killing_an_unknown_process_is_an_error(supervisor: Supervisor) -> None:
    with pytest.raises(NotFound):
        await supervisor.kill("nobody")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_child_process_survives_a_signal_to_the_supervisor(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    supervisor_process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR_SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert supervisor_process.stdout
    assert supervisor_process.stdout.readline() == b"supervising\n"
    pids = [int(str(state_of(tmp_path, name)["pid"])) for name in ("sleeper", "stubborn")]
    assert all(alive(pid) for pid in pids)
    supervisor_process.send_signal(number)
    supervisor_process.wait(timeout=10)
    asyncio.run(until(lambda: not any(alive(pid) for pid in pids), seconds=2))
    if number != signal.SIGKILL:
        assert {state_of(tmp_path, name)["status"] for name in ("sleeper", "stubborn")} == {"stopped"}
