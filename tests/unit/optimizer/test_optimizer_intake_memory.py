"""The estimate of a job's memory is close to what it uses."""

from __future__ import annotations

import subprocess
import sys

from tiny_model import make_tiny

from slmops.kit.modelfile import ModelFacts, inspect
from slmops.optimizer.intake import needed_bytes

SMOLLM2 = ModelFacts("llama", 134_515_008, 98_362_432, "gguf")
_JOB = """
import sys
from pathlib import Path
from slmops.optimizer.measure.benchmark import peak_rss_bytes
from slmops.optimizer.intake.export import check_parity, export
from slmops.optimizer.intake import materialize
source, work = map(Path, sys.argv[1:])
model = materialize(source, work / "reference")
check_parity(model, export(model, work / "exported"))
print("peak", peak_rss_bytes())
"""


def test_the_estimate_matches_the_measurements():
    assert 2.1e9 < needed_bytes(SMOLLM2) < 2.5e9
    assert 7.9e9 < needed_bytes(SMOLLM2, calibrated=True) < 8.3e9


def test_reading_and_exporting_a_tiny_model_stays_below_the_estimate(tmp_path):
    source = make_tiny(tmp_path / "hf", "llama")
    done = subprocess.run(
        [sys.executable, "-c", _JOB, str(source), str(tmp_path)], capture_output=True, text=True, check=True
    )
    peak = int(done.stdout.rpartition("peak ")[2])
    assert needed_bytes(inspect(source)) / 3 < peak < needed_bytes(inspect(source))
