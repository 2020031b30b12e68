"""Composition root of the optimizer."""

from __future__ import annotations

from importlib.metadata import version

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.profile import PROFILES
from slmops.kit.bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.objects import Objects
from slmops.kit.service import Service
from slmops.kit.settings import load
from slmops.optimizer.engine import Engine
from slmops.optimizer.handlers import Handlers, routes
from slmops.optimizer.settings import Settings
from slmops.optimizer.store import ObjectResults

# A result is only as good as what made it: another version of any of these makes it anew.
_TOOLS = ("slmops-optimizer", "onnxruntime", "onnxruntime-genai", "torch", "transformers")


def build(settings: Settings) -> Service:
    """Raises `InvalidMessage` for a profile that does not exist."""
    unknown = sorted(set(settings.profiles) - set(PROFILES))
    if unknown:
        raise InvalidMessage(
            f"no device profile {', '.join(unknown)}", where="SLMOPS_PROFILES", fix=f"Known: {', '.join(PROFILES)}."
        )
    bus, objects = Bus("optimizer", settings), Objects(settings)
    tools = "_".join(f"{tool}-{version(tool)}" for tool in _TOOLS)
    handlers = Handlers(
        bus,
        objects,
        ObjectResults(objects, tools),
        Engine(settings.data_dir, settings.job_timeout),
        [PROFILES[name] for name in settings.profiles],
        settings.recipes,
        utc_now,
    )
    routes(bus, handlers)
    return Service("optimizer", settings, bus, opening=[objects.open])


def main() -> None:
    build(load(Settings)).run()


if __name__ == "__main__":
    main()
