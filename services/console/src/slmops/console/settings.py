"""The settings of the command line: from `--data`, the environment, or the data folder of `slmops up`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from slmops.contracts.errors import Denied, InvalidMessage, NotFound
from slmops.kit.settings import BusSettings, load

CLIENT_FILE = "client.json"
DEFAULT_DATA = Path.home() / ".slmops"
"""The default data folder of `slmops up`."""


class Settings(BusSettings):
    """Settings from environment variables with the prefix `SLMOPS_`. `TRACEPARENT` has no prefix, as in all tracers."""

    data: Path | None = Field(default=None, description="Data folder of `slmops up`; None: ~/.slmops, if it exists")
    traceparent: str | None = Field(default=None, validation_alias="TRACEPARENT", description="Trace to continue")
    upload_patience: timedelta = Field(
        default=timedelta(minutes=5),
        ge=timedelta(0),
        description="How long a push waits for a store that hangs",
    )
    gateways: Mapping[str, str] = Field(
        default_factory=dict, description="Gateway id → base URL of its API; read from the data folder"
    )


class ClientFile(BaseModel):
    """`client.json` as `slmops up` writes it."""

    nats_url: str
    nats_creds: Path | None = None
    tls_ca: Path | None = None
    gateways: dict[str, str] = Field(default_factory=dict)
    trace_file: Path | None = None


def find(data: Path | None = None) -> Settings:
    """Returns the settings of this call.

    `data`, from the command line, overrides the environment; the environment overrides the default folder. Without
    any of them, the address is NATS' own default. Raises `NotFound` if no system was started in a named folder,
    `InvalidMessage` if a value does not validate.
    """
    settings = load(Settings)
    folder = data or settings.data or DEFAULT_DATA
    client = _read(folder / CLIENT_FILE)
    if client is None:
        if data or settings.data:
            raise NotFound(
                "no system has been started with this data folder",
                where=str(folder),
                fix=f"Start one (slmops up --data {folder}) or name its folder with --data.",
            )
        return settings
    found = client.model_dump()
    if data is None:
        given = settings.model_fields_set
        # Credentials and authorities belong to an address: the folder's credentials are never sent to another server.
        address = {"nats_url", "nats_creds", "tls_ca"}
        kept = address if "nats_url" in given else given & (address - {"nats_url"})
        for name in kept | (given & {"trace_file", "gateways"}):
            found.pop(name)
    return settings.model_copy(update=found | ({"data": data} if data else {}))


def _read(path: Path) -> ClientFile | None:
    try:
        return ClientFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Denied(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        raise InvalidMessage(
            "the file was not written by `slmops up` or is damaged",
            where=str(path),
            fix="Start the system again to rewrite it: slmops up.",
        ) from error
