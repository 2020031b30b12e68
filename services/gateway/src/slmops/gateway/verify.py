"""Whether a folder is the package that the plan names: checked as everybody checks it, who is given a package."""

from __future__ import annotations

from slmops.kit.package import verify_package

__all__ = ["verify_package"]
