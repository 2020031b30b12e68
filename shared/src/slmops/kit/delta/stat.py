"""Statistics of a delta: bytes by coding."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

from slmops.contracts.errors import InvalidDelta, NotFound
from slmops.kit.delta.format import DeltaFile, Header, Record, read_header, records


class Share(BaseModel):
    """The records of one coding: their number, their bytes in the delta and the bytes that they produce."""

    records: int = 0
    delta_bytes: int = 0
    target_bytes: int = 0


class Stat(BaseModel):
    """The contents of a delta. `size_bytes` is the size of the delta including its header."""

    size_bytes: int
    target_bytes: int
    base: tuple[DeltaFile, ...]
    target: tuple[DeltaFile, ...]
    codings: dict[str, Share] = Field(default_factory=dict)

    @classmethod
    def of(cls, header: Header, size_bytes: int) -> Stat:
        total = sum(file.size_bytes for file in header.target)
        return cls(size_bytes=size_bytes, target_bytes=total, base=header.base, target=header.target)

    def add(self, record: Record) -> None:
        share = self.codings.setdefault(record.coding.name.lower(), Share())
        share.records += 1
        share.delta_bytes += record.size_bytes
        share.target_bytes += record.target_bytes
        self.size_bytes += record.size_bytes


def describe(path: Path) -> Stat:
    """Reads a whole delta without applying it. Raises `InvalidDelta`, `NotFound`."""
    try:
        with path.open("rb") as source:
            header = read_header(source)
            stat = Stat.of(header, source.tell())
            for _, record in records(source, header):
                stat.add(record)
    except FileNotFoundError as error:
        raise NotFound("the file does not exist", where=str(path), fix="Check the path.") from error
    except InvalidDelta as error:
        raise InvalidDelta(error.what, where=str(path), fix=error.fix) from error
    return stat
