"""Builds and pushes images on a Docker engine through its SDK and reports each step.

The SDK selects the engine: by DOCKER_HOST and related variables, otherwise the local socket. The classic builder is
used, because every engine has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import docker
from docker.errors import APIError, DockerException, ImageNotFound
from docker.utils import kwargs_from_env
from requests.exceptions import RequestException

from slmops.contracts.errors import Denied, InvalidMessage, NotFound, PermanentError, SlmopsError, Unreachable

OnStep = Callable[[str], None]
OutputLines = Iterable[Mapping[str, Any]]
_LOCAL = "unix:///var/run/docker.sock"
_STEP_LENGTH = 100
_BUILDERS_OWN = ("--->", "Removing intermediate container")
"""Lines of the builder itself, not of a command that it runs."""
_FORBIDDEN = ("denied", "unauthorized", "authentication required")


class Engine:
    """A Docker engine; close it or use it as a context manager. Every method raises `Unreachable` without an answer."""

    def __init__(self) -> None:
        settings = kwargs_from_env()
        self.address: str = settings.get("base_url") or _LOCAL
        with self._translate_errors():
            self._api = docker.APIClient(version="auto", **settings)

    def build(self, context: Iterator[bytes], on_step: OnStep, **options: Any) -> str:
        """Builds an image and returns its id. `options` are those of `docker.APIClient.build`.

        Raises `PermanentError` with the engine's message and the step that failed.
        """
        with self._translate_errors():
            lines = self._api.build(
                fileobj=context, custom_context=True, decode=True, rm=True, forcerm=True, timeout=None, **options
            )
            return _read_build_output(lines, on_step)

    def inspect(self, image: str) -> dict[str, Any]:
        """Returns the engine's description of an image. Raises `NotFound`."""
        with self._translate_errors():
            found: dict[str, Any] = self._api.inspect_image(image)
            return found

    def push(self, image: str, on_step: OnStep) -> None:
        """Pushes the image to the registry in its name, with the engine's login there. Raises `Denied`."""
        with self._translate_errors():
            for line in self._api.push(image, stream=True, decode=True):
                if problem := line.get("error"):
                    raise _push_error(problem, image)
                on_step(f"push {line.get('id', image)}: {line.get('status', '')}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.close()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except ImageNotFound as error:
            raise NotFound(str(error.explanation), where=self.address, fix="Build, pull or import it first.") from error
        except APIError as error:
            kind = InvalidMessage if error.is_client_error() else PermanentError
            raise kind(f"the Docker engine refused the request: {error.explanation}", where=self.address) from error
        except (DockerException, RequestException) as error:
            raise Unreachable(
                f"no Docker engine answers: {_root_cause(error)}",
                where=self.address,
                fix="Start one (dockerd, as root) and check it with `docker info`, or set DOCKER_HOST.",
            ) from error


def _read_build_output(lines: OutputLines, on_step: OnStep) -> str:
    step, image, last = "", "", ""
    for line in lines:
        if problem := line.get("error"):
            raise PermanentError(
                f"the image was not built: {problem}",
                where=step or None,
                fix=f"Last output before the error: {last}" if last else "Check that the base image can be pulled.",
            )
        image = line.get("aux", {}).get("ID", image)
        if text := str(line.get("stream") or line.get("status") or "").strip():
            if text.startswith("Step "):
                step, last = " ".join(text.split())[:_STEP_LENGTH], ""
                on_step(step)
            elif not text.startswith(_BUILDERS_OWN):
                last = text
    if not image:
        raise PermanentError("the engine stopped before the image was built", where=step or None, fix="See its log.")
    return image


def _push_error(problem: str, image: str) -> SlmopsError:
    if any(word in problem.lower() for word in _FORBIDDEN):
        return Denied(f"the registry refused the image: {problem}", where=image, fix="Log in: docker login REGISTRY")
    return Unreachable(
        f"the image was not pushed: {problem}", where=image, fix="Check that the tag starts with a registry."
    )


def _root_cause(error: BaseException) -> str:
    """Returns the innermost error, because the SDK wraps it several times in messages for developers."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
