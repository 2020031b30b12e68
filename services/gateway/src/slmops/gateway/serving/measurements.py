"""Measurements of a release since the last batch: counts and samples, never text of a prompt or an answer."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from slmops.contracts.descriptor import Digest
from slmops.gateway.serving.inference import Done

_SAMPLES = 1000  # per release and interval; the latest are kept


def _samples() -> deque[float]:
    return deque(maxlen=_SAMPLES)


@dataclass(slots=True)
class ReleaseMeasurement:
    """The counts of one release. `failed` counts requests that failed because of the gateway.

    A refused prompt or a client that disconnected is not counted as failed.
    """

    release: Digest
    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    decode_s: float = 0.0
    """Seconds of decoding, with the first token counted at the rate of the others, so that
    `completion_tokens / decode_s` is the decoding rate."""
    ttft_sum_s: float = 0.0
    ttft_s: deque[float] = field(default_factory=_samples)
    tokens_per_s: deque[float] = field(default_factory=_samples)

    def add(self, done: Done) -> None:
        self.requests += 1
        self.prompt_tokens += done.prompt_tokens
        self.completion_tokens += done.completion_tokens
        self.ttft_sum_s += done.ttft_s
        self.ttft_s.append(done.ttft_s)
        if done.tokens_per_s is not None:
            self.decode_s += done.completion_tokens / done.tokens_per_s
            self.tokens_per_s.append(done.tokens_per_s)

    def add_failure(self) -> None:
        self.requests += 1
        self.failed += 1


class Measurements:
    """Holds one `ReleaseMeasurement` for each release that answered since the last `take`."""

    def __init__(self) -> None:
        self._releases: dict[Digest, ReleaseMeasurement] = {}

    def of(self, release: Digest) -> ReleaseMeasurement:
        return self._releases.setdefault(release, ReleaseMeasurement(release))

    def take(self) -> dict[Digest, ReleaseMeasurement]:
        """Returns the measurements since the last call and resets them."""
        taken, self._releases = self._releases, {}
        return taken
