"""Composition root of the command line: our commands by name, and the commands that other distributions add.

A command's module is imported when the command is called, so each call waits only for what it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points, version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from slmops.console.session import plugin_command, report_errors
from slmops.contracts.exit_codes import ExitCode

if TYPE_CHECKING:
    from typer._click import Command, Context

GROUPS = {
    "model": "models",
    "variant": "models:variant_app",
    "blueprint": "blueprints",
    "rollout": "rollouts",
    "gateway": "gateways",
    "fleet": "fleet",
    "job": "jobs",
    "recipe": "recipes",
    "eval": "evaluations",
    "package": "packages",
    "delta": "deltas",
    "bundle": "bundles",
    "trust": "trust",
    "storage": "storage",
    "stream": "streams",
    "dlq": "deadletters",
    "user": "users",
}
"""Group → its module in `slmops.console.commands`, and the name of its `typer.Typer` if that is not `app`."""
FURTHER = {"package": "images", "bundle": "results", "storage": "verifying"}
"""Group → a module whose `declare(app)` adds one more command to it."""
SINGLE = {
    "optimize": "optimizing",
    "chat": "chat",
    "status": "status",
    "doctor": "status",
    "attention": "attention",
    "whoami": "users",
}
"""Command without a group → its module, whose `declare(app)` adds it."""
PLUGINS = "slmops.commands"
"""Entry point group: name of the command → a function for typer. `slmops up` is registered there."""


def _version(wanted: bool) -> None:
    if wanted:
        print(version("slmops-console"))
        raise typer.Exit


def root(
    _version_: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Take small language models from weights to a fleet of edge gateways that serve them.

    Exit codes: 0 done, 1 refused, 2 wrong usage, 3 a watched rollout did not complete, 65 wrong input, 70 bug in
    slmops, 75 temporarily unreachable, 77 not permitted, 130 interrupted.
    """


def _typer() -> typer.Typer:
    return typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_show_locals=False)


class _Commands(Mapping[str, "Command"]):
    """Every command of the first level by name, imported at its first use."""

    def __init__(self) -> None:
        plugins = {entry.name: entry for entry in sorted(entry_points(group=PLUGINS), key=lambda entry: entry.name)}
        self._plugins: Mapping[str, EntryPoint] = plugins
        self._names = (*GROUPS, *SINGLE, *plugins)
        self._imported = cache(self._import)

    def __getitem__(self, name: str) -> Command:
        if name not in self._names:
            raise KeyError(name)
        with report_errors():  # a missing module is an error with a fix, not a traceback
            return self._imported(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _import(self, name: str) -> Command:
        parent = _typer()
        parent.callback()(lambda: None)  # with it, typer makes a group of one command too
        if name in GROUPS:
            parent.add_typer(_group(name))
        elif name in SINGLE:
            declare: Callable[[typer.Typer], None] = _module(SINGLE[name]).declare
            declare(parent)
        else:
            parent.command(name)(plugin_command(self._plugins[name].load()))
        group = typer.main.get_command(parent)
        assert isinstance(group, TyperGroup)
        return group.commands[name]


@cache
def _group(name: str) -> typer.Typer:
    module, _, attribute = GROUPS[name].partition(":")
    group: typer.Typer = getattr(_module(module), attribute or "app")
    if name in FURTHER:
        _module(FURTHER[name]).declare(group)
    return group


def _module(name: str) -> Any:
    return import_module(f"slmops.console.commands.{name}")


class _Root(TyperGroup):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.commands = _Commands()  # type: ignore[assignment]

    def list_commands(self, ctx: Context) -> list[str]:
        return list(self.commands)


def build() -> typer.Typer:
    app = _typer()
    app.callback(cls=_Root, epilog="Example: slmops model ls")(root)
    return app


def main() -> None:
    try:
        build()()
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    main()
