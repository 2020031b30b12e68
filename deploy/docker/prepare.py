"""Makes the keys and the configuration of a deployment in containers. Each container gets only its own.

The authority's volume holds all seeds, and no other container mounts it. Every other volume becomes `/data` in its
container. Its keys are in `keys/`, owned by root, so that the container can read but not change them. A second run
keeps existing keys and signs the services' credentials again, so that a changed permission table takes effect.

Certificates of NATS and S3 come from `/certificates` if it holds `ca.pem`, otherwise from an authority of our own. Ours
are renewed by a run after two thirds of a year; then `docker compose kill -s HUP nats` makes NATS read its new one.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from slmops.contracts.permissions import ANSWERING_PERMISSIONS, ENROL_USER, SYSTEM_USER, answering_user
from slmops.kit.bus.nats_auth import accounts_folder, server_config
from slmops.kit.clock import utc_now
from slmops.local.certificates import Certificates
from slmops.local.layout import Layout
from slmops.local.private import write_atomically
from slmops.local.servers import identities
from slmops.local.weed_tls import CONFIG_NAME, security_config

AUTHORITY = Path("/authority")
CERTIFICATES = Path("/certificates")
"""The operator's own: `ca.pem`, and `nats.pem` and `s3.pem`, each with its certificate, chain and key."""
TRUSTED = "trusted-authorities.pem"
HOSTS = ("nats", "s3", *filter(None, os.environ.get("SLMOPS_TLS_HOSTS", "").split(",")))
VALID_FOR = timedelta(days=365)
SERVICES = Path("/services")
GATEWAYS = Path("/gateways")
DATA = Path("/data")
"""Where each container mounts its own volume."""
GROUP = 10001
"""The user and group `slmops` of the image."""
USES_OBJECTS = ("registry", "optimizer", "packager")


def main() -> None:
    layout = Layout(AUTHORITY)
    layout.prepare(accounts=accounts_folder(SERVICES / "nats" / "store"))
    trusted = {TRUSTED: certificate_files(layout, CERTIFICATES)["ca.pem"]}
    for home in sorted(SERVICES.iterdir()):
        _write_keys(home, (_server_files(layout, home) or _service_files(layout, home.name)) | trusted)
    for home in sorted(GATEWAYS.iterdir()):
        paths = (layout.creds(ENROL_USER), layout.enrolment_token, layout.trusted_key)
        _write_keys(home, _copies(paths) | {"trusted-root.json": layout.trusted_root.read_text()} | trusted)


def certificate_files(layout: Layout, own: Path) -> dict[str, str]:
    """Returns `ca.pem`, `nats.pem` and `s3.pem`: the operator's, or ours, which are issued or renewed here."""
    names = ("nats", "s3")
    if (own / "ca.pem").exists():
        return {file: (own / file).read_text() for file in ("ca.pem", *(f"{name}.pem" for name in names))}
    ours = Certificates(layout.certificates.folder, HOSTS, VALID_FOR)
    ours.renew(utc_now())
    return {"ca.pem": ours.trusted.read_text()} | {f"{name}.pem": ours.server(name).read_text() for name in names}


def _server_files(layout: Layout, home: Path) -> dict[str, str]:
    """Returns the files of a server; an empty dict for a folder that does not belong to a server."""
    if home.name == "nats":
        text = server_config(
            layout.authority(),
            DATA / "store",
            port=4222,
            host="0.0.0.0",  # noqa: S104
            certificate=DATA / "keys" / "nats.pem",
            websocket="0.0.0.0:8443",
        )
        return {"nats-server.conf": text, "nats.pem": certificate_files(layout, CERTIFICATES)["nats.pem"]}
    if home.name == "s3":
        identity = layout.weed_identity
        return _copies([identity]) | {
            "identities.json": identities(layout.s3_credentials()),
            CONFIG_NAME: security_config(DATA / "keys" / identity.name),
            "s3.pem": certificate_files(layout, CERTIFICATES)["s3.pem"],
        }
    return {}


def _service_files(layout: Layout, service: str) -> dict[str, str]:
    """Returns the files of a service, of the console, or of the provisioner."""
    files = {"nats.creds": layout.creds(service).read_text()}
    if service in ANSWERING_PERMISSIONS:
        files["nats-answers.creds"] = layout.creds(answering_user(service)).read_text()
    if service in USES_OBJECTS:
        keys = layout.s3_credentials()
        settings = {"SLMOPS_S3_ACCESS_KEY": keys.access_key, "SLMOPS_S3_SECRET_KEY": keys.secret_key}
        files["s3.env"] = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    if service == "packager":
        files |= _copies([layout.signing_key])
        # Only online keys and public metadata of the trust repository. Keyholders' keys stay with the authority.
        for folder in (layout.trust.online, layout.trust.metadata):
            files |= {f"tuf/{folder.name}/{path.name}": path.read_text() for path in sorted(folder.iterdir())}
    if service == "access":
        files |= _copies([layout.access_keys, layout.creds(SYSTEM_USER), layout.first_admin])
    if service == "rollout":
        files |= _copies([layout.gateway_signing_key, layout.enrolment_token, layout.plan_signing_key])
    return files


def _copies(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: path.read_text() for path in paths}


def _write_keys(home: Path, files: Mapping[str, str]) -> None:
    """Writes the files of the container whose volume is mounted at `home`, and makes its user the volume's owner."""
    keys = home / "keys"
    keys.mkdir(exist_ok=True)
    os.chown(keys, 0, GROUP)
    keys.chmod(0o750)
    for name, text in files.items():
        path = keys / name
        for folder in reversed(path.relative_to(keys).parents[:-1]):
            (keys / folder).mkdir(exist_ok=True)
            os.chown(keys / folder, 0, GROUP)
            (keys / folder).chmod(0o750)
        write_atomically(path, text)
        os.chown(path, 0, GROUP)
        path.chmod(0o640)
    os.chown(home, GROUP, GROUP)


if __name__ == "__main__":
    main()
