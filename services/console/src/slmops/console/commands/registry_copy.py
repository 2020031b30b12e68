"""Copies a package from an OCI registry to a layout on disk with skopeo, which knows the operator's logins and proxies.

The registry is not trusted: manifest and signature are fetched and checked first, so nothing is downloaded beyond what
the trusted key signed.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path
from typing import Final, NamedTuple

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import Denied, DigestMismatch, InvalidMessage, NotFound, SlmopsError, Unreachable
from slmops.contracts.manifest import MANIFEST_LIMIT_BYTES, Manifest, layers_by_path
from slmops.kit.oci_layout import parse_attachment, signature_tag
from slmops.kit.package import check_signed
from slmops.kit.signature import signed_files

SCHEME: Final = "docker://"
_REFERENCE = re.compile(
    r"(?P<repository>[\w.-]+(:\d+)?(/[\w.-]+)+)(:(?P<tag>[\w][\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_KINDS: tuple[tuple[type[SlmopsError], str], ...] = (
    (Denied, r"unauthorized|denied|authentication required"),
    (NotFound, r"manifest unknown|name unknown|not found|repository name not known"),
)


class PackageAddress(NamedTuple):
    """A package in a registry. `name` is the tag or the digest with its separator."""

    repository: str
    name: str

    @classmethod
    def parse(cls, text: str) -> PackageAddress:
        """Parses `docker://HOST/REPOSITORY[:TAG][@DIGEST]`. Raises `InvalidMessage`."""
        found = _REFERENCE.fullmatch(text.removeprefix(SCHEME))
        if not found:
            raise InvalidMessage(f"{text!r} is not a reference", fix="Write docker://HOST/REPOSITORY:TAG.")
        name = f"@{found['digest']}" if found["digest"] else f":{found['tag'] or 'latest'}"
        return cls(found["repository"], name)

    def named(self, name: str) -> str:
        return f"{SCHEME}{self.repository}{name}"


async def copy_from_registry(
    reference: PackageAddress, directory: Path, key: Path, digest: Digest | None, *, tls_verify: bool
) -> Digest:
    """Copies a package and its signature to the layout `directory`; returns the digest of the signed manifest.

    Raises `NotFound` if skopeo is not installed or the registry lacks the package or its signature, `Denied`,
    `Unreachable`, `InvalidMessage`, `DigestMismatch`, `SignatureInvalid`.
    """
    tls = "" if tls_verify else "=false"
    raw = await _skopeo("inspect", "--raw", f"--tls-verify{tls}", reference.named(reference.name))
    found = digest_of(raw)
    if digest not in (None, found):
        raise DigestMismatch(f"the registry holds {found}, not {digest}", where=reference.named(reference.name))
    bundle = await _copy_signature(reference.named(f":{signature_tag(found)}"), directory, tls)
    signed = await asyncio.to_thread(signed_files, bundle, key)
    check_signed(found, layers_by_path(Manifest.decode(raw)), signed)
    await _copy(reference.named(f"@{found}"), directory, "package", tls)
    return found


async def _copy_signature(source: str, directory: Path, tls: str) -> Path:
    """Copies the attachment to the layout and returns the path of the OMS bundle in it."""
    attached = parse_attachment(await _skopeo("inspect", "--raw", f"--tls-verify{tls}", source), source)
    if attached.layers[0].size > MANIFEST_LIMIT_BYTES:
        raise DigestMismatch(f"the signature has more than {MANIFEST_LIMIT_BYTES} bytes", where=source)
    await _copy(source, directory, "signature", tls)
    return directory / blob_key(attached.layers[0].digest)


async def _copy(source: str, directory: Path, name: str, tls: str) -> None:
    await _skopeo("copy", "--quiet", f"--src-tls-verify{tls}", source, f"oci:{directory}:{name}")


async def _skopeo(action: str, *arguments: str) -> bytes:
    program = shutil.which("skopeo")
    if program is None:
        raise NotFound("skopeo is not installed", fix="Install it: apt-get install skopeo.")
    # The policy of the machine is about other signatures. We check ours, whatever it says.
    argv = [program, "--insecure-policy", action, *arguments]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        lines = err.decode(errors="replace").strip().splitlines() or ["no message"]
        raise _translated(lines[-1], next(argument for argument in arguments if argument.startswith(SCHEME)))
    return out


def _translated(line: str, source: str) -> SlmopsError:
    """Returns the error of skopeo's last line, which is logfmt: `time="…" level=fatal msg="…"`."""
    logged = re.search(r'msg="((?:[^"\\]|\\.)*)"', line)
    what = (logged[1] if logged else line).replace('\\"', '"')[:400]
    kind = next((kind for kind, pattern in _KINDS if re.search(pattern, what, re.IGNORECASE)), Unreachable)
    fixes: dict[type[SlmopsError], str] = {
        NotFound: "Copy the package and its signature: slmops package export prints the commands.",
        Denied: f"Log in: skopeo login {source.removeprefix(SCHEME).partition('/')[0]}.",
    }
    plain = "http: server gave HTTP response to HTTPS client"
    fix = "For a registry without TLS: --no-tls-verify." if plain in what else fixes.get(kind)
    return kind(f"the registry cannot be read: {what}", where=source, fix=fix)
