from __future__ import annotations

from fuzz import bundle, delta, manifest, results
from fuzz.harness import main

main({"bundle": bundle.target, "delta": delta.target, "manifest": manifest.target, "results": results.target})
