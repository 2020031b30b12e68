"""The factory release in an image: a verified package, the release document, and the key and root that the device
trusts.

It contains no secrets: no token, no credentials, no private key. A device gets those when it is set up.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from slmops.console.image.buildcontext import Content
from slmops.contracts.blueprint import Blueprint
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.factory import PACKAGE_PATH, RELEASE_PATH, TRUSTED_KEY_PATH, TRUSTED_ROOT_PATH
from slmops.contracts.manifest import FILE_PATH, MANIFEST_PATH, OCI_MANIFEST, SIGNATURE, SIGNATURE_PATH, Manifest
from slmops.contracts.names import check_name, check_version
from slmops.contracts.plan import Release
from slmops.contracts.profile import PROFILES
from slmops.kit.package import verify_package

_OCI = "org.opencontainers.image."
_OURS = "io.slmops."


@dataclass(frozen=True)
class Factory:
    package: Path
    manifest: Manifest
    release: Release
    profile: str
    trusted_key: bytes
    trusted_root: bytes
    created: datetime
    """When the package was made. All files in the image have this time, so that a rebuild gives the same image."""

    def files(self) -> dict[str, Content]:
        """Returns the files: path in the factory folder → content."""
        paths = [MANIFEST_PATH, SIGNATURE_PATH, *(layer.annotations[FILE_PATH] for layer in self.manifest.layers)]
        return {f"{PACKAGE_PATH}/{path}": self.package / path for path in paths} | {
            RELEASE_PATH: self.release.model_dump_json(by_alias=True, indent=2).encode(),
            TRUSTED_KEY_PATH: self.trusted_key,
            TRUSTED_ROOT_PATH: self.trusted_root,
        }

    def labels(self, base: str) -> dict[str, str]:
        """Returns the image's labels. `base` is the name of its base image."""
        release = self.release
        return {
            f"{_OCI}title": f"slmops gateway with {release.model}",
            f"{_OCI}version": release.version,
            f"{_OCI}created": self.created.isoformat(),
            f"{_OCI}base.name": base,
            f"{_OURS}model": release.model,
            f"{_OURS}profile": self.profile,
            f"{_OURS}recipe": self.manifest.annotations.get(f"{_OURS}recipe", ""),
            f"{_OURS}manifest": release.manifest.digest,
        }


def read(package: Path, trusted_key: Path, trusted_root: Path, blueprint: Blueprint | None = None) -> Factory:
    """Verifies a package folder and returns its factory release. `blueprint` sets how it is probed and served.

    Raises what `verify_package` raises, `InvalidMessage` if package and blueprint do not match, `NotFound`.
    """
    from slmops.kit.trust.folder import read_root  # imports tuf

    if not package.is_dir():
        raise NotFound("there is no such folder", where=str(package), fix="Name the folder of a package.")
    manifest = verify_package(package, trusted_key)
    name, version = _annotation(manifest, f"{_OCI}title"), _annotation(manifest, f"{_OCI}version")
    profile = _annotation(manifest, f"{_OURS}profile")
    spec = blueprint or Blueprint(name="any", model=check_name(name, "model name"), profile=profile)
    if (spec.model, spec.profile) != (name, profile):
        raise InvalidMessage(
            f"the blueprint is for {spec.model} on {spec.profile}, the package is {name} for {profile}",
            where=str(package),
            fix="Use the blueprint of the gateways that this package is for.",
        )
    release = _release(package, manifest, check_version(version), spec)
    created = datetime.fromisoformat(_annotation(manifest, f"{_OCI}created")).astimezone(UTC)
    root = read_root(trusted_root)
    return Factory(package, manifest, release, profile, trusted_key.read_bytes(), root, created)


def _release(package: Path, manifest: Manifest, version: str, spec: Blueprint) -> Release:
    if spec.profile not in PROFILES:
        raise NotFound(f"there is no device profile {spec.profile}", fix=f"Use one of: {', '.join(sorted(PROFILES))}.")
    return Release.under(
        spec,
        PROFILES[spec.profile],
        revision=1,
        version=version,
        manifest=Descriptor.of((package / MANIFEST_PATH).read_bytes(), OCI_MANIFEST),
        signature=Descriptor.of((package / SIGNATURE_PATH).read_bytes(), SIGNATURE),
        size_bytes=sum(layer.size for layer in manifest.layers),
    )


def _annotation(manifest: Manifest, annotation: str) -> str:
    try:
        return manifest.annotations[annotation]
    except KeyError:
        raise InvalidMessage(f"the package's manifest has no annotation {annotation}", where=MANIFEST_PATH) from None
