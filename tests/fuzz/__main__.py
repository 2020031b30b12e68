from __future__ import annotations

from fuzz import delta
from fuzz.harness import main

main({"delta": delta.target})
