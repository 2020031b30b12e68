"""Where the system is: from `--data`, from the environment, or from the folder of `slmops up`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from slmops.contracts.errors import Denied, InvalidMessage, NotFound
from slmops.kit.settings import BusSettings, load

CLIENT_FILE = "client.json"
DEFAULT_DATA = Path.home() / ".slmops"
"""Where `slmops up` keeps its data by default."""


class Settings(BusSettings):
    """Read from the environment with the prefix `SLMOPS_`; `TRACEPARENT` has none, as every tracer spells it so."""

    data: Path | None = Field(default=None, description="Data folder of `slmops up`; None: ~/.slmops, if it is there")
    traceparent: str | None = Field(default=None, validation_alias="TRACEPARENT", description="Trace to continue")
    gateways: Mapping[str, str] = Field(
        default_factory=dict, description="Gateway id → base URL of its API; found in the data folder"
    )


class ClientFile(BaseModel):
    """`client.json` as `slmops up` writes it."""

    nats_url: str
    nats_creds: Path | None = None
    gateways: dict[str, str] = Field(default_factory=dict)
    trace_file: Path | None = None


def find(data: Path | None = None) -> Settings:
    """The settings of this call.

    `data`, from the command line, beats the environment; the environment beats the default folder. Without any of
    them the address is NATS' own default. Raises `NotFound` when a folder was named and nothing has run there,
    `InvalidMessage` when a value does not validate.
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
        # Credentials belong to an address: those of the folder are not shown to another server.
        kept = {"nats_url", "nats_creds"} if "nats_url" in given else given & {"nats_creds"}
        for name in kept | (given & {"trace_file", "gateways"}):
            found.pop(name)
    return settings.model_copy(update=found | ({"data": data} if data else {}))


def _read(path: Path) -> ClientFile | None:
    try:
        return ClientFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Denied(f"cannot be read: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        raise InvalidMessage(
            "this is not what `slmops up` writes", where=str(path), fix="Start the system again; it writes it anew."
        ) from error
