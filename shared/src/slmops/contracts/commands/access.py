"""Commands and queries that the access service answers."""

from __future__ import annotations

from typing import ClassVar

from pydantic import AwareDatetime, Field

from slmops.contracts.commands.base import Command, Result
from slmops.contracts.identity import Role
from slmops.contracts.names import PUBLIC_USER_KEY, Name


class UserCredential(Result):
    """A person's credential. `jwt` makes the person's own nkey a user of the bus; it contains no secret."""

    user: Name
    role: Role
    jwt: str
    expires_at: AwareDatetime


class AddUser(Command[UserCredential]):
    """Give a person a role. `public_key` is the person's own user nkey (`U…`); its private half goes nowhere."""

    service: ClassVar[str] = "access"
    name: ClassVar[str] = "add_user"
    user: Name
    role: Role
    public_key: str = Field(pattern=PUBLIC_USER_KEY)


class RenewUser(Command[UserCredential]):
    """Sign the credential of the sender again, for the same key, so that it expires later."""

    service: ClassVar[str] = "access"
    name: ClassVar[str] = "renew_user"


class UserView(Result):
    user: Name
    role: Role
    public_key: str
    added_at: AwareDatetime
    added_by: str = Field(default="", description="Such as person:alice; empty: the start of the system")
    expires_at: AwareDatetime
    revoked_at: AwareDatetime | None = None
    revoked_by: str = ""
    reason: str = ""


class RevokeUser(Command[UserView]):
    """Take a person's credential away at once, also if they are connected."""

    service: ClassVar[str] = "access"
    name: ClassVar[str] = "revoke_user"
    user: Name
    reason: str = Field(default="", max_length=200)


class UserList(Result):
    users: tuple[UserView, ...]
    cursor: str | None = Field(default=None, description="Ask with it for the next page; None: this is the last one")


class ListUsers(Command[UserList]):
    """List people by name, a page at a time."""

    service: ClassVar[str] = "access"
    name: ClassVar[str] = "list_users"
    limit: int = Field(default=200, ge=1, le=1000)
    cursor: str | None = None
