"""Composition root of the optimizer."""

from __future__ import annotations

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.profile import PROFILES
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.main import errors_as_one_line
from slmops.kit.objects.store import Objects
from slmops.kit.service import Service
from slmops.kit.settings import load
from slmops.optimizer.handlers import Handlers, routes
from slmops.optimizer.jobs.board import Board
from slmops.optimizer.jobs.environment import environment_digest
from slmops.optimizer.jobs.retention import Retention
from slmops.optimizer.jobs.worker import Worker
from slmops.optimizer.jobs.workspace import Workspace
from slmops.optimizer.recipes.ancestry import Ancestry
from slmops.optimizer.settings import Settings
from slmops.optimizer.store import Results


def build(settings: Settings) -> Service:
    """Builds the service. Raises `InvalidMessage` for a profile that does not exist."""
    unknown = sorted(set(settings.profiles) - set(PROFILES))
    if unknown:
        raise InvalidMessage(
            f"unknown device profiles: {', '.join(unknown)}",
            where="SLMOPS_PROFILES",
            fix=f"Use some of: {', '.join(PROFILES)}.",
        )
    bus, objects = Bus("optimizer", settings), Objects(settings)
    board, results = Board(bus), Results(objects, environment_digest)
    workspace = Workspace(settings.data_dir, settings.job_timeout)
    ancestry = Ancestry(bus, objects, wanted=settings.anchor)
    worker = Worker(objects, results, workspace, board, ancestry, settings.job_memory_bytes)
    enabled, recipes, home = settings.profiles, settings.recipes, settings.data_dir
    routes(bus, Handlers(bus, objects, board, worker, PROFILES, enabled, recipes, ancestry, home, utc_now))
    retention = Retention(results, workspace, settings.cache_kept, settings.work_kept, utc_now)
    return Service("optimizer", settings, bus, opening=[objects.open], tasks=[retention.run])


def main() -> None:
    with errors_as_one_line():
        build(load(Settings)).run()


if __name__ == "__main__":
    main()
