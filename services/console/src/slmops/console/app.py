"""Composition root of the command line: our command groups, and the commands of other distributions."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version
from typing import Annotated

import typer

from slmops.console.commands import (
    attention,
    blueprints,
    bundles,
    chat,
    deadletters,
    deltas,
    evaluations,
    gateways,
    images,
    jobs,
    models,
    optimizing,
    packages,
    recipes,
    results,
    rollouts,
    storage,
    streams,
    trust,
)
from slmops.console.session import plugin_command
from slmops.contracts.exit_codes import ExitCode

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


GROUPS = (
    *(models, blueprints, rollouts, gateways, jobs, recipes, evaluations),
    *(packages, deltas, bundles, trust, storage, streams, deadletters),
)


def build() -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_show_locals=False)
    app.callback(epilog="Example: slmops model ls")(root)
    for group in GROUPS:
        app.add_typer(group.app)
    app.add_typer(models.variant_app)
    images.declare(packages.app)
    results.declare(bundles.app)
    optimizing.declare(app)
    chat.declare(app)
    attention.declare(app)
    for entry in sorted(entry_points(group=PLUGINS), key=lambda entry: entry.name):
        app.command(entry.name)(plugin_command(entry.load()))
    return app


def main() -> None:
    try:
        build()()
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    main()
