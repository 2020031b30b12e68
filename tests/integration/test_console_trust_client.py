"""`slmops trust client` against an HTTP server that can return forged files: each attack is refused by its name."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from trust_world import TrustWorld, everything_below
from typer.testing import Result
from unit.console.console_examples import nothing_set_up, slmops

from slmops.contracts.tuf_names import METADATA_LIMIT_BYTES, ROLLOUT_TARGET, Attack
from slmops.kit.trust import ceremony
from slmops.kit.trust.ceremony import rollout_file, rollout_keys
from slmops.kit.trust.keys import new_key

MANIFEST = b"manifest"


class Web:
    """Serves the metadata of a world and its targets over HTTP. `overrides` maps the end of a file name to the content
    returned instead: None cuts the connection, and `ENDLESS` sends data until the client disconnects."""

    def __init__(self, world: TrustWorld) -> None:
        self.world, self.overrides, self.sent = world, dict[str, bytes | None](), 0
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Logs nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.rpartition("/")[2]
        override = next((data for end, data in self.overrides.items() if name.endswith(end)), b"")
        data = override or (b"" if override is None else self.genuine(request.path))
        request.send_response(404 if data is None else 200)
        if override != ENDLESS:
            request.send_header("Content-Length", "1000" if override is None else str(len(data or b"")))
        request.end_headers()
        if override == ENDLESS:
            self.endless(request)
        else:
            request.wfile.write(data or b"")

    def genuine(self, path: str) -> bytes | None:
        folder, _, name = path.rpartition("/")
        if folder == "/metadata":
            return self.world.file(name)
        if not folder.startswith("/targets"):
            return None
        targets = self.world.folder.newest("targets")
        assert targets is not None
        return rollout_file(rollout_keys(targets.signed)) if name.endswith("rollout.json") else MANIFEST

    def endless(self, request: BaseHTTPRequestHandler) -> None:
        self.sent = 0
        try:
            while self.sent < 64 << 20:  # far more than a client may take, and an end for one that takes it all
                self.sent += request.wfile.write(b"x" * (1 << 16))
        except OSError:
            pass


ENDLESS = b"endless"


class Client:
    def __init__(self, web: Web, home: Path) -> None:
        self.web, self.trusted, self.into = web, home / "trusted", home / "targets"

    def __call__(self, *command: str, **given: str) -> Result:
        own = {"metadata-dir": str(self.trusted), "metadata-url": f"{self.web.url}/metadata/"} | given
        options = [word for name, value in own.items() for word in (f"--{name}", value)]
        return slmops("trust", "client", "--json", *options, *command)

    def init(self) -> None:
        assert self("init", str(self.web.world.folder.first_root)).exit_code == 0

    def download(self, target: str) -> Result:
        given = {"target-name": target, "target-base-url": f"{self.web.url}/targets/", "target-dir": str(self.into)}
        return self("download", **given)

    def version(self, role: str) -> int:
        return int(json.loads((self.trusted / f"{role}.json").read_bytes())["signed"]["version"])

    def refused(self, done: Result) -> Attack:
        """Asserts that the call failed with `trust_refused`. Returns the attack that the error names."""
        assert (done.exit_code, done.stdout) == (1, ""), done.output
        problem = json.loads(done.stderr)
        assert problem["code"] == "trust_refused"
        return Attack(problem["what"].partition(":")[0])


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing_set_up(monkeypatch, tmp_path / "nowhere")


@pytest.fixture
def world(tmp_path: Path) -> TrustWorld:
    return TrustWorld(tmp_path / "packager")


@pytest.fixture
def web(world: TrustWorld) -> Iterator[Web]:
    web = Web(world)
    yield web
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def target(world: TrustWorld) -> str:
    return world.publish()


@pytest.fixture
def client(web: Web, tmp_path: Path, target: str) -> Client:
    """Returns an up-to-date client that trusts a repository with one package."""
    client = Client(web, tmp_path / "client")
    client.init()
    assert client("refresh").exit_code == 0
    return client


def test_signed_targets_are_downloaded(client: Client, target: str) -> None:
    for name, content in ((target, MANIFEST), (ROLLOUT_TARGET, client.web.genuine("/targets/trust/x.rollout.json"))):
        done = client.download(name)
        assert done.exit_code == 0, done.stderr
        assert Path(json.loads(done.stdout)["file"]).read_bytes() == content
    assert len(list(client.into.iterdir())) == 2


def test_the_client_follows_rotations_of_every_key(client: Client, world: TrustWorld) -> None:
    for _ in range(2):
        for role in ("root", "targets", "snapshot", "timestamp", "packages"):
            ceremony.rotate(world.folder, role, world.holders(), world.now).apply()
    world.adopt()
    assert client.download(world.publish(version="1.0.1")).exit_code == 0
    newest = world.folder.newest("root")
    assert newest is not None and client.version("root") == newest.signed.version > 4
    history = everything_below(client.trusted / "root_history")
    client.init()  # with the old root: its history is kept
    assert everything_below(client.trusted / "root_history") == history
    assert client("refresh").exit_code == 0
    assert client.version("root") == newest.signed.version


# ---- attacks: each forges files of a world that the client trusts ----------------------------------------------


def rollback(web: Web, client: Client) -> None:
    old = web.world.file("timestamp.json")
    web.world.publish(version="1.0.1")
    assert client("refresh").exit_code == 0
    web.overrides["timestamp.json"] = old


def freeze(web: Web, client: Client) -> None:
    web.world.age(timedelta(days=2))


def expired(web: Web, client: Client) -> None:
    ceremony.rotate(web.world.folder, "root", web.world.holders(), web.world.now - timedelta(days=400)).apply()
    web.world.adopt()


def mix_and_match(web: Web, client: Client) -> None:
    old = web.world.file(f"{web.world.version('snapshot')}.snapshot.json")
    web.world.publish(version="1.0.1")
    web.overrides[f"{web.world.version('snapshot')}.snapshot.json"] = old


def endless(web: Web, client: Client) -> None:
    web.overrides["timestamp.json"] = ENDLESS


def endless_root(web: Web, client: Client) -> None:
    web.overrides["2.root.json"] = ENDLESS


def wrong_key(web: Web, client: Client) -> None:
    web.overrides["timestamp.json"] = web.world.sign_as("timestamp", lambda s: s.update(version=99), new_key())


def too_few_keys(web: Web, client: Client) -> None:
    ceremony.rotate(web.world.folder, "root", web.world.holders(), web.world.now).apply()
    document = json.loads((web.world.folder.metadata / "2.root.json").read_bytes())
    old = web.world.folder.first_root.read_bytes().decode()
    by_old = [signature for signature in document["signatures"] if signature["keyid"] in old]
    by_new = [signature for signature in document["signatures"] if signature["keyid"] not in old]
    assert (len(by_old), len(by_new)) == (3, 3)
    web.overrides["2.root.json"] = json.dumps(document | {"signatures": by_old[:1] + by_new}).encode()


def corrupt(web: Web, client: Client) -> None:
    web.overrides["timestamp.json"] = b'{"signed": {"_type": "timestamp"'


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (rollback, Attack.ROLLBACK),
        (freeze, Attack.FREEZE),
        (expired, Attack.EXPIRED),
        (mix_and_match, Attack.MIX_AND_MATCH),
        (endless, Attack.ENDLESS_DATA),
        (endless_root, Attack.ENDLESS_DATA),
        (wrong_key, Attack.WRONG_KEY),
        (too_few_keys, Attack.TOO_FEW_KEYS),
        (corrupt, Attack.CORRUPT),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_attack_is_named_in_the_error_and_changes_no_trusted_file(
    web: Web, client: Client, target: str, attack: Callable[[Web, Client], None], name: Attack
) -> None:
    attack(web, client)
    kept = {role: client.version(role) for role in ("timestamp", "snapshot", "targets")}
    assert client.refused(client("refresh")) == name
    assert client.refused(client.download(target)) == name
    assert not client.into.exists()
    assert client.version("snapshot") == kept["snapshot"]
    # The client stops reading at its limit. The rest is in socket buffers, which the kernel enlarges under load.
    assert web.sent <= METADATA_LIMIT_BYTES + (32 << 20)
    if web.overrides:  # without the forged files the client continues
        web.overrides.clear()
        assert client.download(target).exit_code == 0


@pytest.mark.parametrize(
    ("bytes_", "name"),
    [
        (b"forged!!", Attack.ARBITRARY_PACKAGE),
        (b"short", Attack.ARBITRARY_PACKAGE),
        (b"longer than the manifest", Attack.ENDLESS_DATA),
        (ENDLESS, Attack.ENDLESS_DATA),
    ],
)
def test_a_target_with_other_content_is_refused(client: Client, target: str, bytes_: bytes, name: Attack) -> None:
    client.web.overrides["manifest.json"] = bytes_
    assert client.refused(client.download(target)) == name
    assert everything_below(client.into) == {}


def test_an_unsigned_or_revoked_package_is_refused_as_arbitrary(client: Client, world: TrustWorld, target: str) -> None:
    assert client.refused(client.download("smollm2/9.9.9/" + "0" * 64 + "/manifest.json")) == Attack.ARBITRARY_PACKAGE
    ceremony.revoke(world.folder, "smollm2", world.holders(), world.now).apply()
    world.adopt()
    assert client.refused(client.download(target)) == Attack.ARBITRARY_PACKAGE


def test_a_network_failure_is_not_reported_as_an_attack(client: Client) -> None:
    client.web.overrides["timestamp.json"] = None
    broken = client("refresh")
    assert (broken.exit_code, json.loads(broken.stderr)["code"]) == (1, "unreachable")
    client.web.overrides.clear()
    refused = client("refresh", **{"metadata-url": "http://127.0.0.1:1/"})
    assert (refused.exit_code, json.loads(refused.stderr)["code"]) == (1, "unreachable")
    assert json.loads(refused.stderr)["what"] == "the repository does not answer: MaxRetryError"
    missing = client("refresh", **{"metadata-url": f"{client.web.url}/metadata/nothing/here/"})
    assert (missing.exit_code, json.loads(missing.stderr)["code"]) == (1, "not_ready")


def test_invalid_roots_urls_and_options_are_typed_errors(client: Client, world: TrustWorld, tmp_path: Path) -> None:
    forged = json.loads(world.folder.first_root.read_bytes())
    forged["signed"]["roles"]["root"]["threshold"] = 1
    targets = (world.folder.metadata / "1.targets.json").read_text()
    roots = {"forged": json.dumps(forged), "text": "x", "targets": targets, "empty": "{}"}
    before = everything_below(client.trusted)
    for name, content in roots.items():
        (tmp_path / name).write_text(content)
        done = client("init", str(tmp_path / name))
        assert (done.exit_code, json.loads(done.stderr)["code"]) == (1, "invalid_message"), name
    assert client("init", str(tmp_path / "missing")).exit_code == 1
    assert everything_below(client.trusted) == before
    for url in ("ftp://x/", "http://[::1", "nothing"):
        assert json.loads(client("refresh", **{"metadata-url": url}).stderr)["code"] == "invalid_message"
    fresh = client("refresh", **{"metadata-dir": str(tmp_path / "fresh")})
    assert (fresh.exit_code, json.loads(fresh.stderr)["code"]) == (1, "not_found")
    taken = client("init", str(world.folder.first_root), **{"metadata-dir": str(tmp_path / "text")})
    assert (taken.exit_code, json.loads(taken.stderr)["code"]) == (1, "denied")
    assert json.loads(slmops("trust", "client", "--json", "refresh").stderr)["what"] == "--metadata-dir is required"
