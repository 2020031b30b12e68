"""Runs the command line in a separate process with the operator's credentials."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from typing import Any

import forked
from integration.kit_world import World


@dataclass(frozen=True)
class CommandResult:
    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def problem(self) -> Any:
        return json.loads(self.err)


class Cli:
    def __init__(self, world: World, **settings: str) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLMOPS_", "TRACEPARENT"))}
        connection = {"SLMOPS_NATS_URL": world.url, "SLMOPS_NATS_CREDS": str(world.creds["console"]), "COLUMNS": "120"}
        self.env = {**inherited, **connection, **settings}

    async def start(self, *arguments: str) -> Process:
        argv = (sys.executable, "-m", "slmops.console.app", *arguments)
        return await asyncio.create_subprocess_exec(*argv, env=self.env, stdin=PIPE, stdout=PIPE, stderr=PIPE)

    async def __call__(self, *arguments: str, stdin: str = "") -> CommandResult:
        done = await asyncio.to_thread(forked.run, forked.CONSOLE, *arguments, env=self.env, stdin=stdin)
        assert "Traceback" not in done.err, done.err
        return CommandResult(*done)


async def wait_for_exit(process: Process, stdin: str = "") -> CommandResult:
    async with asyncio.timeout(60):
        out, err = await process.communicate(stdin.encode())
    assert b"Traceback" not in err, err.decode()
    return CommandResult(process.returncode or 0, out.decode(), err.decode())
