"""Composition root of the rollout service."""

from __future__ import annotations

from slmops.contracts.events import GatewayEnrolled, GatewayRevoked
from slmops.kit.bus.relay import run_relay
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal
from slmops.kit.main import errors_as_one_line
from slmops.kit.service import Service
from slmops.kit.settings import load
from slmops.rollout import membership, presence, queries
from slmops.rollout.domain.membership import check_not_revoked
from slmops.rollout.enrolment import Enrolment
from slmops.rollout.enrolment_stream import keep_enrolments
from slmops.rollout.handlers import Handlers, routes
from slmops.rollout.membership import MembershipHandlers
from slmops.rollout.overlays import Overlays
from slmops.rollout.presence import PresenceHandlers, reports_on
from slmops.rollout.reconcile import Reconciler
from slmops.rollout.settings import Settings
from slmops.rollout.signing import PlanSigner
from slmops.rollout.store import MIGRATIONS, project, schema


def build(settings: Settings) -> Service:
    bus = Bus("rollout", settings)
    journal = Journal(
        settings.database_url, service="rollout", metadata=schema(), migrations=MIGRATIONS, project=project
    )
    credentials = Enrolment(settings.enrolment_token, settings.gateway_signing_seed, settings.credential_life)
    signer = PlanSigner(settings.plan_signing_key)
    reconciler = Reconciler(journal, bus, signer, utc_now, settings.tick_every)

    overlays = Overlays(journal, lambda: bus.client, settings.tick_every)

    async def enrolment_of(gateway_id: str) -> GatewayEnrolled | None:
        known = await bus.client.latest(GatewayEnrolled, gateway_id)
        if known is not None:
            revoked = await bus.client.latest(GatewayRevoked, f"{gateway_id}.{known.public_key}")
            check_not_revoked(known, revoked)
        return known

    handlers = Handlers(journal, reconciler, enrolment_of, utc_now)
    routes(bus, handlers)
    queries.routes(bus, queries.Queries(journal, utc_now))
    presence.routes(
        bus,
        PresenceHandlers(journal, enrolment_of, reports_on(lambda: bus.client), handlers.on_gateway_reports),
    )
    membership.routes(bus, MembershipHandlers(journal, reconciler, overlays, credentials, enrolment_of, utc_now))
    return Service(
        "rollout",
        settings,
        bus,
        opening=[journal.open, reconciler.open, credentials.open, signer.open],
        tasks=[
            lambda: run_relay(journal, bus.client),
            reconciler.run,
            overlays.run,
            lambda: keep_enrolments(journal, lambda: bus.client),
        ],
        closing=[journal.close],
        checks=[journal.problem],
    )


def main() -> None:
    with errors_as_one_line():
        build(load(Settings)).run()


if __name__ == "__main__":
    main()
