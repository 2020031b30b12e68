"""A client with only the shared bootstrap user can neither guess the token nor read it from stored data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from rollout_world import NAME, System, open_system

from slmops.contracts.commands import EnrolGateway
from slmops.contracts.errors import Denied, InvalidMessage, Problem, Throttled
from slmops.contracts.permissions import PROVISIONER
from slmops.kit.bus import provisioner
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.deadletters import dead_letters
from slmops.kit.bus.nats_auth import new_user_seed, public_key
from slmops.kit.settings import BusSettings

ENROL = "cmd.rollout.enrol"


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with AsyncExitStack() as stack:
        system = await open_system(tmp_path, stack)
        await system.start("rollout")
        yield system


@pytest.fixture
async def bootstrap(system: System) -> AsyncIterator[BusClient]:
    client = await system.connect("enrol", inbox_prefix=b"_INBOX_enrol", patient=False)
    yield client
    await client.close()


def command(token: str, gateway_id: str = "gw-1") -> EnrolGateway:
    return EnrolGateway(gateway_id=gateway_id, blueprint=NAME, public_key=public_key(new_user_seed()), token=token)


async def stored_data(system: System, operator: BusClient) -> bytes:
    """Returns the content of the dead letter queue and of all files of the bus."""
    parts = [
        json.dumps([m.model_dump(mode="json"), dict(m.headers)]).encode() + m.payload
        async for m in dead_letters(operator)
    ]
    files = [path.read_bytes() for path in system.layout.home("nats").rglob("*") if path.is_file()]
    return b"".join([*parts, *files])


async def test_no_dead_letter_contains_the_token(system: System, bootstrap: BusClient) -> None:
    token = system.layout.enrolment_token.read_text().strip()
    good = json.loads(command(token).model_dump_json())
    malformed = [
        json.dumps(good | {"public_key": "no key"}),
        json.dumps(good | {"gateway_id": token}),
        json.dumps(good | {"labels": {token: 1}}),
        json.dumps({"tokn": token}),
        f'{{"token": "{token}"',
        token,
    ]
    for payload in malformed:
        answer = await bootstrap.connection.request(ENROL, payload.encode(), timeout=5, headers={"x-token": token})
        assert Problem.model_validate_json(answer.data).code == InvalidMessage.code
        assert token.encode() not in answer.data
    await bootstrap.connection.publish(ENROL, json.dumps(good).encode())  # without a reply subject
    await bootstrap.connection.publish(ENROL, json.dumps(good).encode(), reply="measure.gw-1")
    with pytest.raises(Denied):
        await bootstrap.request(command("wrong"))  # its answer proves that the messages before it were handled
    operator = await system.connect("console")
    letters = [letter async for letter in dead_letters(operator)]
    assert len(letters) == len(malformed) + 1  # the server replaces a foreign reply subject
    assert {(letter.subject, letter.whole, letter.payload) for letter in letters} == {(ENROL, False, b"")}
    assert {letter.reason for letter in letters if "does not validate" in letter.reason}
    assert token.encode() not in await stored_data(system, operator)
    await operator.close()


async def test_wrong_tokens_are_throttled_per_source(
    system: System, bootstrap: BusClient, caplog: pytest.LogCaptureFixture
) -> None:
    answered: Counter[str] = Counter()
    for number in range(100):
        # The server writes the address itself, so a forged one changes nothing.
        forged = {"Nats-Request-Info": json.dumps({"host": f"10.0.0.{number}"})}
        payload = command(f"guess-{number}", f"gw-{number}").model_dump_json().encode()
        answer = await bootstrap.connection.request(ENROL, payload, timeout=5, headers=forged)
        answered[Problem.model_validate_json(answer.data).code] += 1
    assert answered[Denied.code] < 20
    assert set(answered) == {Denied.code, Throttled.code}
    assert "too many requests of 127.0.0.1 were rejected" in caplog.text
    # The right token is refused, too: a throttled client must not learn whether a token is right.
    with pytest.raises(Throttled) as refused:
        await bootstrap.request(command(system.layout.enrolment_token.read_text().strip()))
    assert refused.value.delay.total_seconds() >= 10
    operator = await system.connect("console")
    assert [letter async for letter in dead_letters(operator)] == []
    await operator.close()


async def test_a_fleet_that_enrols_at_the_same_time_is_not_throttled(system: System, bootstrap: BusClient) -> None:
    token = system.layout.enrolment_token.read_text().strip()
    for number in range(40):
        assert (await bootstrap.request(command(token, f"gw-{number}"))).gateway_id == f"gw-{number}"


async def test_dead_letters_with_tokens_of_an_older_release_are_deleted(system: System) -> None:
    operator = await system.connect("console")
    await operator.store(f"dlq.{ENROL}", b'{"token":"hunter2"}', {})
    await operator.store("dlq.measure.gw-1", b"{}", {})
    await provisioner.run(BusSettings(nats_url=system.url, nats_creds=system.layout.creds(PROVISIONER)))
    assert [letter.subject async for letter in dead_letters(operator)] == ["measure.gw-1"]
    await operator.close()
