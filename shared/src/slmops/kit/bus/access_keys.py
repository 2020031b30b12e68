"""The files that the owner of the system's keys gives to the access service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.identity import Role
from slmops.contracts.names import Name
from slmops.kit.bus.accounts import AccountKeys
from slmops.kit.bus.nats_auth import Authority


class AccessKeys(BaseModel):
    """The seeds that sign accounts and people, and the public keys of the accounts."""

    model_config = ConfigDict(frozen=True)

    signing_key: str = Field(repr=False)
    roles: Mapping[Role, str] = Field(repr=False)
    accounts: AccountKeys

    @classmethod
    def of(cls, authority: Authority) -> Self:
        seeds = {role: authority.role_seed(role) for role in Role}
        return cls(signing_key=authority.accounts, roles=seeds, accounts=authority.account_keys)

    @classmethod
    def in_file(cls, path: Path) -> Self:
        """Raises `InvalidMessage`."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise InvalidMessage(
                f"the access keys cannot be read: {type(error).__name__}",
                where=str(path),
                fix="Set SLMOPS_ACCESS_KEYS.",
            ) from None


class FirstAdmin(BaseModel):
    """The admin with whom a system starts. It holds no secret."""

    user: Name
    role: Role = Role.ADMIN
    public_key: str
    expires_at: AwareDatetime
