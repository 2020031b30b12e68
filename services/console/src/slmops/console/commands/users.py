"""`slmops user` and `slmops whoami`: who may use the system, in which role, and for how long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import AwareDatetime, BaseModel

from slmops.console.credentials_file import write_private
from slmops.console.render import users as render
from slmops.console.session import Session, command
from slmops.contracts.commands import AddUser, ListUsers, RenewUser, RevokeUser, UserView
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.identity import Role
from slmops.contracts.names import Name, check_name
from slmops.kit.bus.client import read_file
from slmops.kit.bus.nats_auth import Credentials, creds_text, new_user_seed, public_key
from slmops.kit.clock import utc_now

app = typer.Typer(
    name="user", help="Add, list and revoke people, and renew your own credentials.", no_args_is_help=True
)
UserName = Annotated[str, typer.Argument(metavar="NAME", help="The person's name, for example alice.")]


class Identity(BaseModel):
    """Whose credentials the command line uses."""

    user: str
    role: Role | None
    public_key: str
    expires_at: AwareDatetime | None
    file: str


class Written(BaseModel):
    user: Name
    role: Role
    expires_at: AwareDatetime
    file: str


class Users(BaseModel):
    users: tuple[UserView, ...]


@command(app, "add", "slmops user add alice --role operator", "slmops user add bob --role viewer --out bob.creds")
async def add(
    session: Session,
    name: UserName,
    role: Annotated[Role, typer.Option(help="What the person may do.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where the credentials go; - prints them. Default: NAME.creds here.", show_default=False),
    ] = None,
) -> None:
    """Give a person a role, and write their credentials to a file that only you can read.

    Hand the file to the person and delete it here. The private key is made on this machine and sent nowhere.
    """
    seed = new_user_seed()
    asked = AddUser(user=check_name(name, "user name"), role=role, public_key=public_key(seed))
    client = await session.client()
    if out == Path("-"):
        print(creds_text((await client.request(asked)).jwt, seed))
        return
    path = out or Path(f"{name}.creds")
    if path.exists():
        raise InvalidMessage("the file exists", where=str(path), fix="Name another one with --out.")
    write_private(path, "")  # before the person exists: their key would be lost if the file could not be written
    try:
        answer = await client.request(asked)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    write_private(path, creds_text(answer.jwt, seed))
    view = Written(user=name, role=role, expires_at=answer.expires_at, file=str(path))
    session.show(view, f"{name} is {role} until {answer.expires_at:%Y-%m-%d}. Credentials: {path}")
    session.remark("\nThey set SLMOPS_NATS_URL and SLMOPS_NATS_CREDS, and renew it in time: slmops user renew.")


@command(app, "ls", "slmops user ls", "slmops user ls --json")
async def ls(session: Session) -> None:
    """List the people who have or had access, by name."""
    client, found, cursor = await session.client(), list[UserView](), None
    while True:
        page = await client.request(ListUsers(cursor=cursor))
        found += page.users
        if (cursor := page.cursor) is None:
            break
    session.show(Users(users=tuple(found)), render.users(found, utc_now(), session.out.width))


@command(app, "revoke", 'slmops user revoke alice --reason "left the company"')
async def revoke(
    session: Session,
    name: UserName,
    reason: Annotated[str, typer.Option(help="Reason; it is stored with the person.")] = "",
) -> None:
    """Take a person's access away: their connections are closed at once, and their key is refused from then on."""
    asked = RevokeUser(user=check_name(name, "user name"), reason=reason)
    view = await (await session.client()).request(asked)
    session.show(view, render.user(view, utc_now()))


@command(app, "renew", "slmops user renew")
async def renew(session: Session) -> None:
    """Renew your own credentials, so that they expire later. The file is replaced; the key stays the same."""
    path, own = _own(session)
    answer = await (await session.client()).request(RenewUser())
    write_private(path, creds_text(answer.jwt, own.seed))
    view = Written(user=answer.user, role=answer.role, expires_at=answer.expires_at, file=str(path))
    session.show(view, f"{answer.user} is {answer.role} until {answer.expires_at:%Y-%m-%d}. Credentials: {path}")


async def whoami(session: Session) -> None:
    """Show whose credentials you use, their role and when they expire. It asks the server whether they are valid."""
    path, own = _own(session)
    await session.client()
    view = Identity(
        user=own.who.name, role=own.who.role, public_key=own.public_key, expires_at=own.until, file=str(path)
    )
    session.show(view, render.identity(own, str(path), utc_now()))


def _own(session: Session) -> tuple[Path, Credentials]:
    path = session.settings.nats_creds
    if path is None:
        raise InvalidMessage("there are no credentials", fix="Set SLMOPS_NATS_CREDS, or name a folder with --data.")
    return path, read_file(path)


def declare(app: typer.Typer) -> None:
    """Adds `whoami` to `app` itself, because it has no group."""
    command(app, "whoami", "slmops whoami", "slmops whoami --json")(whoami)
