from __future__ import annotations

from fuzz import delta, manifest
from fuzz.harness import main

main({"delta": delta.target, "manifest": manifest.target})
