"""Checks a report by measuring again: `python -m slmops.optimizer.jobs.verify REPORT --variant DIR --reference PATH`.

Stdout is one JSON object: a `Verification` (exit code 0 if it agrees, otherwise 1), or a `Problem`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from slmops.contracts.errors import NotFound, Problem, SlmopsError
from slmops.contracts.evaluation import Figure, Verification
from slmops.contracts.model import ModelFile
from slmops.optimizer.intake import materialize
from slmops.optimizer.jobs.report import Report, files_of, read_report, tool_versions
from slmops.optimizer.measure.evaluate import fidelity, reference
from slmops.optimizer.measure.texts import Text, evaluation_text

RELATIVE, ABSOLUTE = 0.01, 1e-3
"""A figure agrees within 1% or 0.001, whichever is more: the number of threads changes how sums are rounded."""


def verify_files(report: Path, variant: Path, version: Path, texts: Sequence[Path] = ()) -> Verification:
    """Calls `verify` with files. `texts` are the evaluation texts, if not the bundled one."""
    return verify(read_report(report), variant, version, evaluation_text(texts))


def verify(report: Report, variant: Path, version: Path, text: Text) -> Verification:
    """Compares files and text by digest, ignoring their names, and measures KL, top-1 and perplexity again.

    `variant` is the genai folder, which may contain other files; `version` is the model as it was registered. Speed,
    memory and energy depend on the machine and are not checked. Raises `NotFound`, what `materialize` raises for a
    model that cannot be read, and `OptimizationFailed` if the variant does not run.
    """
    for path in (variant, version):
        if not path.exists():
            raise NotFound("there is no such file or folder", where=str(path))
    differing = [
        *_differing("variant", report.variant_files, files_of(variant)),
        *_differing("reference", report.reference_files, files_of(version)),
        *([f"text/{text.name}"] if text.digest != report.evaluation_text.digest else []),
    ]
    with TemporaryDirectory(prefix="slmops-verify-") as scratch:
        full = materialize(version, Path(scratch) / "reference")
        against = reference(full, text, windows=report.windows, window_tokens=report.window_tokens)
    found = asdict(fidelity(variant, against, report.seed))
    figures = tuple(_figure(name, getattr(report.evaluation, name), value) for name, value in found.items())
    tools = [(tool, report.tools.get(tool), here) for tool, here in tool_versions().items()]
    return Verification(
        agrees=not differing and all(figure.agrees for figure in figures),
        figures=figures,
        differing=tuple(differing),
        tools=tuple(f"{tool} {then} → {here}" for tool, then, here in tools if then != here),
    )


def _differing(what: str, expected: Sequence[ModelFile], found: Sequence[ModelFile]) -> list[str]:
    here = {file.digest for file in found}
    return [f"{what}/{file.path}" for file in expected if file.digest not in here]


def _figure(name: str, reported: float | None, found: float) -> Figure:
    """Compares a figure. NaN agrees with NaN; a figure that was not reported never agrees."""
    agrees = reported is not None and (
        math.isclose(reported, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        or (math.isnan(reported) and math.isnan(found))
    )
    return Figure(name=name, reported=reported, found=found, agrees=agrees)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m slmops.optimizer.jobs.verify", description=__doc__)
    parser.add_argument("report", type=Path, help="the report of a variant: evaluation.json in its package")
    parser.add_argument("--variant", type=Path, required=True, help="genai folder of the variant, or unpacked package")
    parser.add_argument("--reference", type=Path, required=True, help="the model as it was registered")
    parser.add_argument("--text", type=Path, action="append", default=[], help="evaluation text, if not bundled")
    arguments = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        found = verify_files(arguments.report, arguments.variant, arguments.reference, arguments.text)
    except SlmopsError as error:
        print(Problem.of(error).model_dump_json())
        return error.exit_code
    print(found.model_dump_json(indent=2))
    return 0 if found.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
