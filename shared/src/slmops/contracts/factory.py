"""A device's preinstalled release: a folder in its image or on a read-only partition.

    release.json   a `Release`: which package this is, and how it is probed and served
    package/       the package's files at their paths, with manifest and signature
    trusted.pem    the public key with which the device verifies this package and every later one
    trusted-root.json   the root of trust (TUF) that leads to later packages and the plan's key

The console writes the folder, the gateway reads it.
"""

from __future__ import annotations

RELEASE_PATH = "release.json"
PACKAGE_PATH = "package"
TRUSTED_KEY_PATH = "trusted.pem"
TRUSTED_ROOT_PATH = "trusted-root.json"
