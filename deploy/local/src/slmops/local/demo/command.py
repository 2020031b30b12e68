"""The command `slmops demo`."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from slmops.contracts.errors import SlmopsError
from slmops.local.signals import cancelled_by_signals

_WIDTH = 120


def demo(
    model: Annotated[Path | None, typer.Option(help="Your own model: a GGUF file or a Hugging Face directory.")] = None,
    golden: Annotated[Path | None, typer.Option(help="Golden prompts (JSONL) for your model.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the report and the data; existing data is deleted first.")
    ] = Path("build/demo"),
) -> None:
    """Run the demo: from a GGUF file to three gateways that serve it, and the rejection of a bad version.

    Example: slmops demo --model ./my-model.gguf --golden ./questions.jsonl
    """
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH  # a log file has no width, and the tables need this much
    raise typer.Exit(asyncio.run(_run(console, model, golden, out)))


async def _run(console: Console, model: Path | None, golden: Path | None, out: Path) -> int:
    # Imported here: every call of the command line loads this module, and these imports take longer than all others.
    from slmops.local.demo.report import show
    from slmops.local.demo.run import Demo
    from slmops.local.demo.story import Story
    from slmops.local.system import System

    data = out / "data"
    shutil.rmtree(data, ignore_errors=True)
    run = Demo(Story(console), System(data), model=model, golden=golden, work=out)
    code = 0
    try:
        with cancelled_by_signals():
            await run.run()
    except asyncio.CancelledError:
        console.print("[yellow]Interrupted. All started processes were stopped.[/]")
        return 130
    except SlmopsError as error:
        run.report.failures.append(str(error))
        code = error.exit_code
    finally:
        run.report.write(out / "report.json")
    show(run.report, console)
    for failure in run.report.failures:
        console.print(f"[red]✗ {failure}[/]", highlight=False)
    console.print(f"report: {out / 'report.json'}", highlight=False)
    return code or (1 if run.report.failures else 0)
