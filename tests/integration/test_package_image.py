"""An image with a package on a real Docker engine: built without a network, and it serves without a network.

The tests need what `.ci/engine` makes: an engine, and for the slow tests a base image and the gateway's wheels.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml
from docker.models.containers import Container
from docker_engine import ROOT, base, engine, wheels
from integration.device import BLUEPRINT, HELLO, new_root, tiny_package
from unit.console.console_examples import nothing_set_up, slmops

from slmops.console.commands.images import package_context, package_image
from slmops.console.image.buildcontext import stream
from slmops.console.image.engine import Engine
from slmops.console.image.factory import Factory, read
from slmops.contracts.errors import InvalidMessage, NotFound, PermanentError, Unreachable

ASK = f"""
import json, urllib.request
body = json.dumps({HELLO!r}).encode()
print(urllib.request.urlopen("http://127.0.0.1:8080/v1/chat/completions", body, timeout=60).read().decode())
"""
CONNECT = """
import socket
try: socket.create_connection(("10.255.255.1", 53), 3); print("reached")
except OSError as error: print(error.errno)
"""


@dataclass
class Docker:
    """The engine, and a unique prefix for the names of all images and containers of this file."""

    engine: Engine
    sdk: docker.DockerClient
    mark: str

    def tag(self, name: str) -> str:
        return f"{self.mark}-{name}:1.0.0"

    def run(self, image: str, **options: Any) -> Container:
        settings = {"read_only": True, "tmpfs": {"/tmp": ""}, "cap_drop": ["ALL"], "network_mode": "none"}
        return self.sdk.containers.run(image, detach=True, labels={"made-by": self.mark}, **settings | options)


@pytest.fixture(scope="module")
def real() -> Iterator[Docker]:
    """Yields the engine. Removes this file's containers and images afterwards; the gateway's image stays as a cache."""
    made = Docker(engine(), docker.from_env(), f"slmops-test-{uuid.uuid4().hex[:8]}")
    with made.engine:
        yield made
        for container in made.sdk.containers.list(all=True, filters={"label": f"made-by={made.mark}"}):
            container.remove(force=True, v=True)
        tags = [tag for image in made.sdk.images.list() for tag in image.tags if tag.startswith(made.mark)]
        for tag in tags:
            made.sdk.images.remove(tag, force=True)
        made.sdk.close()


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory, genai_model: Path) -> Factory:
    folder = tmp_path_factory.mktemp("package")
    package, keys = tiny_package(folder, genai_model)
    return read(package, keys.public, new_root(folder), BLUEPRINT)


@pytest.fixture(scope="module")
def gateway_image(real: Docker) -> str:
    """Returns a fake gateway image of a few bytes."""
    return imported(real, "gateway", 'CMD ["python", "-m", "slmops.gateway.app"]', "USER root")


def imported(real: Docker, name: str, *changes: str) -> str:
    """Imports an image with one empty file. Returns its tag."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    repository, _, version = real.tag(name).partition(":")
    real.sdk.api.import_image_from_data(content.getvalue(), repository=repository, tag=version, changes=list(changes))
    return real.tag(name)


def build(real: Docker, gateway_image: str, factory: Factory, tag: str) -> dict[str, Any]:
    steps: list[str] = []
    made = package_image(
        real.engine, gateway_image, factory, tag, steps.append, base=gateway_image, blueprint="edge-chat"
    )
    assert steps[0].startswith("Step 1/")
    return real.engine.inspect(made)


def test_the_image_has_labels_a_health_check_and_an_unprivileged_user(
    real: Docker, gateway_image: str, factory: Factory
) -> None:
    config = build(real, gateway_image, factory, real.tag("labels"))["Config"]
    assert config["Labels"] == factory.labels(gateway_image)
    assert config["User"] == "10001:10001"
    assert list(config["Volumes"]) == ["/data"]
    assert config["Healthcheck"]["Test"][-1].endswith(":8000/health")
    assert {"SLMOPS_FACTORY=/opt/factory", "SLMOPS_BLUEPRINT=edge-chat"} <= set(config["Env"])


def test_building_a_package_again_makes_the_same_layers(real: Docker, gateway_image: str, factory: Factory) -> None:
    def layers() -> list[str]:
        context = stream(package_context(factory, None), factory.created)
        arguments = {"GATEWAY_IMAGE": gateway_image}
        image = real.engine.build(context, lambda step: None, nocache=True, buildargs=arguments, network_mode="none")
        found: list[str] = real.engine.inspect(image)["RootFS"]["Layers"]
        real.sdk.images.remove(image)
        return found

    first = layers()
    time.sleep(1.1)  # times in a layer have whole seconds
    assert layers() == first
    assert len(first) == 2


def test_a_base_image_that_is_missing_or_not_a_gateway_is_refused(real: Docker, factory: Factory) -> None:
    with pytest.raises(InvalidMessage, match="does not start a gateway"):
        build(
            real, imported(real, "other", 'CMD ["python", "-m", "slmops.registry.app"]'), factory, real.tag("refused")
        )
    with pytest.raises(NotFound):
        build(real, f"{real.mark}-nowhere:1", factory, real.tag("refused"))


def test_the_error_of_a_failed_build_names_the_step(real: Docker, gateway_image: str) -> None:
    recipe = f"FROM {gateway_image}\nCOPY nowhere /\n".encode()
    with pytest.raises(PermanentError, match="nowhere") as failure:
        real.engine.build(stream({"Dockerfile": recipe}), lambda step: None, network_mode="none")
    assert failure.value.where == "Step 2/2 : COPY nowhere /"


@pytest.mark.slow  # needs the base image
def test_the_error_of_a_failed_build_has_the_output_of_the_command(real: Docker) -> None:
    recipe = f"FROM {base(real.engine)}\nRUN echo no such wheel && exit 3\n".encode()
    with pytest.raises(PermanentError, match="returned a non-zero code: 3") as failure:
        real.engine.build(stream({"Dockerfile": recipe}), lambda step: None, network_mode="none")
    assert failure.value.where
    assert failure.value.where.startswith("Step 2/2 : RUN echo")
    assert failure.value.fix
    assert "no such wheel" in failure.value.fix


def test_pushing_to_an_unreachable_registry_is_an_error(real: Docker, gateway_image: str) -> None:
    tag = "127.0.0.1:1/edge:1"
    real.sdk.images.get(gateway_image).tag(tag)
    try:
        with pytest.raises(Unreachable, match="the image was not pushed"):
            real.engine.push(tag, lambda step: None)
    finally:
        real.sdk.images.remove(tag, noprune=True)


# ---- end to end -------------------------------------------------------------------------------------------


def health(container: Container) -> str:
    container.reload()
    return str(container.attrs["State"]["Health"]["Status"])


def output_of(container: Container, *argv: str) -> str:
    code, output = container.exec_run(list(argv))
    assert code == 0, output.decode()
    return str(output.decode())


def wait_until_healthy(container: Container) -> None:
    deadline = time.monotonic() + 60
    while health(container) != "healthy":
        assert container.status == "running", container.logs().decode()
        assert time.monotonic() < deadline, container.logs().decode()
        time.sleep(0.2)


@pytest.mark.slow  # the first build of a gateway's image takes a minute
@pytest.mark.timeout(600)
def test_a_device_with_the_image_serves_without_a_network(
    real: Docker, factory: Factory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing_set_up(monkeypatch, tmp_path / "nowhere")
    (tmp_path / "edge.yaml").write_text(yaml.safe_dump(BLUEPRINT.model_dump(mode="json")))
    (tmp_path / "trusted.pem").write_bytes(factory.trusted_key)
    tag = real.tag("edge")
    (tmp_path / "root.json").write_bytes(factory.trusted_root)
    settings = {"--key": tmp_path / "trusted.pem", "--root": tmp_path / "root.json"}
    settings |= {"--blueprint": tmp_path / "edge.yaml", "--tag": tag}
    settings |= {"--base": base(real.engine), "--source": ROOT, "--wheels": wheels()}
    options = [str(word) for pair in settings.items() for word in pair]
    done = slmops("package", "image", str(factory.package), *options, "--json")
    assert done.exit_code == 0, done.stderr
    view = json.loads(done.stdout)
    assert (view["tag"], view["manifest"]) == (tag, factory.release.manifest.digest)

    device = real.run(tag, environment={"SLMOPS_GATEWAY_ID": "gw-9"})
    wait_until_healthy(device)
    answer = json.loads(output_of(device, "python", "-c", ASK))
    assert answer["system_fingerprint"] == factory.release.manifest.digest
    assert answer["usage"]["completion_tokens"] == BLUEPRINT.runtime.max_tokens

    assert output_of(device, "id", "-u").strip() == "10001"
    assert output_of(device, "python", "-c", CONNECT).strip() == "101"  # network is unreachable
    writable = "import os; print([p for p in ('/opt/factory', '/opt/slmops', '/etc') if os.access(p, os.W_OK)])"
    assert output_of(device, "python", "-c", writable).strip() == "[]"
    heavy = (
        "import importlib.util as u; print([m for m in ('torch', 'docker', 'sqlalchemy', 'typer') if u.find_spec(m)])"
    )
    assert output_of(device, "python", "-c", heavy).strip() == "[]"

    device.restart(timeout=20)
    wait_until_healthy(device)
    assert json.loads(output_of(device, "python", "-c", ASK))["model"] == factory.release.model
