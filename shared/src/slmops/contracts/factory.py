"""What comes with a device: a folder with one release, in its image or on a read-only partition.

    release.json   a `Release`: which package this is, and how it is probed and served
    package/       the package's files at their paths, with manifest and signature
    trusted.pem    the public key by which the device judges this package and every later one
    trusted-root.json   the root of trust (TUF) in which later packages and the plan's key are named

Who writes it is the console, who reads it is the gateway.
"""

from __future__ import annotations

RELEASE_PATH = "release.json"
PACKAGE_PATH = "package"
TRUSTED_KEY_PATH = "trusted.pem"
TRUSTED_ROOT_PATH = "trusted-root.json"
