"""Makes the keys and the configuration of a deployment in containers, once; each container gets only its own.

The authority's volume holds every seed, and no other container mounts it. Every other volume becomes `/data` in its
container: what it needs lies in `keys/`, belongs to root, and can be read there and not be changed. Run again, it
keeps what is there and signs the services' credentials anew, so that a changed table of permissions takes effect.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from slmops.contracts.permissions import ANSWERING_PERMISSIONS, ENROL_USER, answering_user
from slmops.kit.bus.nats_auth import server_config
from slmops.local.layout import Layout
from slmops.local.private import write_atomically
from slmops.local.servers import identities
from slmops.local.weed_tls import CONFIG_NAME, security_config

AUTHORITY = Path("/authority")
SERVICES = Path("/services")
GATEWAYS = Path("/gateways")
DATA = Path("/data")
"""Where each container sees its own volume."""
GROUP = 10001
"""The user and group `slmops` of the image."""
USES_OBJECTS = ("registry", "optimizer", "packager")


def main() -> None:
    layout = Layout(AUTHORITY)
    layout.prepare()
    for home in sorted(SERVICES.iterdir()):
        _hand_over(home, _server_files(layout, home) or _service_files(layout, home.name))
    for home in sorted(GATEWAYS.iterdir()):
        paths = (layout.creds(ENROL_USER), layout.enrolment_token, layout.trusted_key)
        _hand_over(home, _copies(paths) | {"trusted-root.json": layout.trusted_root.read_text()})


def _server_files(layout: Layout, home: Path) -> dict[str, str]:
    """Returns nothing for a folder that does not belong to a server."""
    if home.name == "nats":
        store = DATA / "store"
        return {"nats-server.conf": server_config(layout.authority(), store, port=4222, host="0.0.0.0")}  # noqa: S104
    if home.name == "s3":
        identity = layout.weed_identity
        return _copies([identity]) | {
            "identities.json": identities(layout.s3_credentials()),
            CONFIG_NAME: security_config(DATA / "keys" / identity.name),
        }
    return {}


def _service_files(layout: Layout, service: str) -> dict[str, str]:
    files = {"nats.creds": layout.creds(service).read_text()}
    if service in ANSWERING_PERMISSIONS:
        files["nats-answers.creds"] = layout.creds(answering_user(service)).read_text()
    if service in USES_OBJECTS:
        keys = layout.s3_credentials()
        settings = {"SLMOPS_S3_ACCESS_KEY": keys.access_key, "SLMOPS_S3_SECRET_KEY": keys.secret_key}
        files["s3.env"] = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    if service == "packager":
        files |= _copies([layout.signing_key])
        # Of the trust repository what is online and what is public; keyholders' keys stay with the authority.
        for folder in (layout.trust.online, layout.trust.metadata):
            files |= {f"tuf/{folder.name}/{path.name}": path.read_text() for path in sorted(folder.iterdir())}
    if service == "rollout":
        files |= _copies([layout.gateway_signing_key, layout.enrolment_token, layout.plan_signing_key])
    return files


def _copies(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: path.read_text() for path in paths}


def _hand_over(home: Path, files: Mapping[str, str]) -> None:
    """Write the files for the container whose volume is mounted at `home`, which is given to it."""
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
