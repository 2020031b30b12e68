"""Runs our programs in processes forked from one that has imported them: a real process each, without 1 s of imports.

The parent (`python forked.py SOCKET`) has one thread and runs nothing itself. For each request it forks a child, which
gets the arguments, environment, working directory and standard streams of the request, and calls the module's `main`.
Tests of the start itself (imports, Ctrl-C, wrong settings at import) start `python -m` instead.
"""

from __future__ import annotations

import array
import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

from slmops.kit.lifeline import die_with

CONSOLE = "slmops.console.app"
JOBS = "slmops.optimizer.jobs.main"
JOBS_PARENT = "FORKED_JOBS_PARENT"
"""Variable with a socket: an optimizer forks its jobs from there (`forked_jobs`)."""
_SERVICES = Path(__file__).parent.parent / "services"
_PROGRAMS = [f"slmops.{app.parent.name}.app" for app in _SERVICES.glob("*/src/slmops/*/app.py")]
_IMPORTED_LATER = [
    *(f"slmops.console.commands.{file.stem}" for file in _SERVICES.glob("console/src/slmops/console/commands/*.py")),
    *("alembic.context", "nats.js.kv", "rich.progress", "rich.table"),
]
"""Modules that the programs import when they need them."""
_START_WITHIN_S = 60


class Done(NamedTuple):
    exit_code: int
    out: str
    err: str


class Forked:
    """A running program, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection

    def poll(self) -> int | None:
        with suppress(TimeoutError, BlockingIOError):
            return self._receive(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code, negative for a signal. Raises `subprocess.TimeoutExpired`."""
        try:
            return self._receive(timeout)
        except (TimeoutError, BlockingIOError):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _receive(self, timeout: float | None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            answer = self._connection.recv(32)
            self._connection.close()
            self.returncode = int(answer or -signal.SIGKILL)
        return self.returncode


def start(
    module: str,
    *arguments: object,
    env: Mapping[str, str],
    stdin: IO[bytes] | None = None,
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
) -> Forked:
    """Starts `module` with our working directory. Streams that are None are ours, and an empty standard input."""
    with open(os.devnull, "rb") as nothing:
        streams = (stdin or nothing).fileno(), stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2
        return fork(parent_of(_PROGRAMS + _IMPORTED_LATER), module, list(map(str, arguments)), env, streams)


def fork(
    parent: str,
    module: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    streams: Sequence[int],
    held: Sequence[int] = (),
    folder: Path | None = None,
) -> Forked:
    """Has the parent at the socket `parent` start `module` in a session of its own.

    The program works in `folder`, or where we do, and holds copies of the descriptors.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(parent)
    request = json.dumps([module, arguments, dict(env), str(folder or Path.cwd())]).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (*streams, *held)))]
    connection.sendmsg([len(request).to_bytes(4, "big")], rights)
    connection.sendall(request)
    connection.settimeout(_START_WITHIN_S)
    return Forked(connection, int(_exactly(connection, 8)))


def run(module: str, *arguments: object, env: Mapping[str, str], stdin: str = "", timeout: float = 60) -> Done:
    """Runs `module` to its end. Raises `subprocess.TimeoutExpired` after killing it."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode())
        given.seek(0)
        process = start(module, *arguments, env=env, stdin=given, stdout=out, stderr=err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        out.seek(0), err.seek(0)
        return Done(code, out.read().decode(), err.read().decode())


_lock = threading.Lock()


def parent_of(modules: Sequence[str]) -> str:
    """Returns the socket of the parent that has imported `modules`, and starts it at the first call."""
    with _lock:
        return _start_parent(" ".join(modules))


@cache
def _start_parent(modules: str) -> str:
    folder = tempfile.mkdtemp(prefix="slmops-fork-")
    path = f"{folder}/socket"
    argv = [sys.executable, __file__, path, *modules.split()]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    assert process.stdout.readline() == b"ready\n", "the parent of forked programs does not start"
    atexit.register(_stop, process, Path(path))
    return path


def _stop(process: subprocess.Popen[bytes], path: Path) -> None:
    process.kill()
    process.wait()
    path.unlink()
    path.parent.rmdir()


# ---- in the parent ----------------------------------------------------------------------------------------


def _serve(path: str, modules: Sequence[str]) -> None:
    parent = os.getpid()
    gc.disable()
    for module in modules:
        import_module(module)
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(path)
        listening.listen()
        print("ready", flush=True)
        while listening in select.select([listening, sys.stdin], [], [])[0]:  # our standard input closes with the tests
            connection, _ = listening.accept()
            if os.fork() == 0:
                die_with(parent)
                listening.close()
                os._exit(_attend(connection))
            connection.close()


def _attend(connection: socket.socket) -> int:
    """Starts one program, tells its id, waits for its end and tells its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams = _size_and_streams(connection)
    request = json.loads(_exactly(connection, size))
    attending, pid = os.getpid(), os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        die_with(attending)
        connection.close()
        _become(*request, streams=streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{pid:8}".encode())
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    return 0


def _become(module: str, arguments: Sequence[str], env: Mapping[str, str], folder: str, streams: Sequence[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams[:3]:
        os.close(stream)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    if JOBS_PARENT in env:
        import_module("forked_jobs").fork_jobs(env[JOBS_PARENT])
    sys.argv[:] = ["slmops" if module == CONSOLE else module, *arguments]
    code: Any = 1
    try:
        code = import_module(module).main() or 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    with suppress(BaseException):
        atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(bool(code)))


def _size_and_streams(connection: socket.socket) -> tuple[int, list[int]]:
    streams = array.array("i")
    size, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(8 * streams.itemsize))
    for _, _, data in ancillary:
        streams.frombytes(data)
    return int.from_bytes(size, "big"), list(streams)


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (piece := connection.recv(size - len(found))):
        found += piece
    return found


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
