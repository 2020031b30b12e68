"""A Docker engine through its SDK: builds and pushes images and reports each step.

Which engine is Docker's own affair: DOCKER_HOST and its companions, else the local socket. Its classic builder is
asked, which every engine has.
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
Said = Iterable[Mapping[str, Any]]
_LOCAL = "unix:///var/run/docker.sock"
_STEP_LENGTH = 100
_BUILDERS_OWN = ("--->", "Removing intermediate container")
"""Between the lines of what it runs."""
_FORBIDDEN = ("denied", "unauthorized", "authentication required")


class Engine:
    """Every method raises `Unreachable` when the engine does not answer. Close it, or use it as a context."""

    def __init__(self) -> None:
        settings = kwargs_from_env()
        self.address: str = settings.get("base_url") or _LOCAL
        with self._answering():
            self._api = docker.APIClient(version="auto", **settings)

    def build(self, context: Iterator[bytes], on_step: OnStep, **options: Any) -> str:
        """The id of the image. `options` are those of `docker.APIClient.build`.

        Raises `PermanentError` with the engine's own words and the step at which it failed.
        """
        with self._answering():
            said = self._api.build(
                fileobj=context, custom_context=True, decode=True, rm=True, forcerm=True, timeout=None, **options
            )
            return _built(said, on_step)

    def inspect(self, image: str) -> dict[str, Any]:
        """Raises `NotFound`."""
        with self._answering():
            found: dict[str, Any] = self._api.inspect_image(image)
            return found

    def push(self, image: str, on_step: OnStep) -> None:
        """To the registry that the name begins with, as whoever is logged in there. Raises `Denied`."""
        with self._answering():
            for line in self._api.push(image, stream=True, decode=True):
                if problem := line.get("error"):
                    raise _refused(problem, image)
                on_step(f"push {line.get('id', image)}: {line.get('status', '')}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.close()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except ImageNotFound as error:
            raise NotFound(str(error.explanation), where=self.address, fix="Build, pull or import it first.") from error
        except APIError as error:
            kind = InvalidMessage if error.is_client_error() else PermanentError
            raise kind(f"the Docker engine refuses: {error.explanation}", where=self.address) from error
        except (DockerException, RequestException) as error:
            raise Unreachable(
                f"no Docker engine answers: {_cause(error)}",
                where=self.address,
                fix="Start one (dockerd, as root) and see that `docker info` answers, or set DOCKER_HOST.",
            ) from error


def _built(said: Said, on_step: OnStep) -> str:
    step, image, last = "", "", ""
    for line in said:
        if problem := line.get("error"):
            raise PermanentError(
                f"the image was not built: {problem}",
                where=step or None,
                fix=f"The engine said before: {last}" if last else "Is the base image there, or can it be pulled?",
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


def _refused(problem: str, image: str) -> SlmopsError:
    if any(word in problem.lower() for word in _FORBIDDEN):
        return Denied(f"the registry refuses: {problem}", where=image, fix="Log in: docker login REGISTRY")
    return Unreachable(f"the image was not pushed: {problem}", where=image, fix="Does the name begin with a registry?")


def _cause(error: BaseException) -> str:
    """The SDK wraps what happened several times, in words for developers."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
