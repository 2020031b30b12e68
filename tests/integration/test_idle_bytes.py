"""An idle gateway costs the control plane at most 0.25 kbit/s, counted on the wire of a real nats-server with TLS."""

from __future__ import annotations

from bench.idle import TARGET_BYTES_PER_S, idle_bytes_per_s

from slmops.contracts.subjects import spec_of

FLEET = 100_000


def test_an_idle_gateway_is_cheap_and_the_messages_of_a_large_fleet_fit_into_their_streams() -> None:
    found = idle_bytes_per_s()
    assert found["bytes_per_s"] < TARGET_BYTES_PER_S / 2, found["parts"]
    for name, stored in found["stored_bytes"].items():
        spec = spec_of(name)
        assert spec and spec.per_subject
        assert FLEET * spec.per_subject * stored < spec.max_bytes, f"{name}: {stored} bytes each"
