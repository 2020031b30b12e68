"""`slmops demo`."""

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
    golden: Annotated[Path | None, typer.Option(help="Golden prompts (JSONL) that fit it.")] = None,
    out: Annotated[Path, typer.Option(help="Where the report and the data go; data is deleted first.")] = Path(
        "build/demo"
    ),
) -> None:
    """The main job, end to end: from a GGUF file to three answering gateways, and back from a bad version.

    Example: slmops demo --model ./my-model.gguf --golden ./questions.jsonl
    """
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH  # a log has no width of its own, and the tables need this
    raise typer.Exit(asyncio.run(_run(console, model, golden, out)))


async def _run(console: Console, model: Path | None, golden: Path | None, out: Path) -> int:
    # Here, because every call of the command line loads this module, and these take longer than all of the rest.
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
        console.print("[yellow]Interrupted; everything that was started is stopped.[/]")
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
