"""Handles the packager's events and commands: packages chosen variants, answers fetches, withdraws packages."""

from __future__ import annotations

import asyncio
import logging

from slmops.contracts import subjects
from slmops.contracts.clocks import NO_REPORT, ReportMark
from slmops.contracts.commands import (
    BundleContents,
    DescribeTrust,
    FetchMetadata,
    FetchPackage,
    PackageFiles,
    PrepareBundle,
    Withdrawal,
    WithdrawPackage,
)
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import CredentialRevoked, NotFound, NotReady
from slmops.contracts.events import (
    GatewayEnrolled,
    GatewayRemoved,
    GatewayReported,
    GatewayRevoked,
    PackageDeltaPublished,
    PackagePublished,
    VariantOptimized,
)
from slmops.contracts.manifest import ADAPTER_PATH, FILE_PATH, MANIFEST_PATH, SIGNATURE_PATH, DeltaStep
from slmops.contracts.plan import Plan
from slmops.contracts.tuf_names import Attack, refused
from slmops.kit.bus.batches import Refused
from slmops.kit.bus.service_bus import Batch, Bus, MessageContext
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.objects.store import Objects
from slmops.kit.trust.plans import open_plan
from slmops.packager import store
from slmops.packager.assemble import Assembler
from slmops.packager.bundle import base64_text, trust_metadata
from slmops.packager.deltas import DeltaPlanner, withdraw_deltas
from slmops.packager.domain import (
    check_not_needed,
    check_planned,
    decide,
    is_base,
    is_newer,
    needed,
    only_match,
    package_of,
    planned,
    withdrawn,
)
from slmops.packager.export import presigned_file
from slmops.packager.routes import cheapest_route
from slmops.packager.tuf_metadata import TufMetadata

log = logging.getLogger("slmops.packager")


class Handlers:
    def __init__(
        self,
        bus: Bus,
        journal: Journal,
        objects: Objects,
        assembler: Assembler,
        deltas: DeltaPlanner,
        trust: TufMetadata,
        clock: Clock,
    ) -> None:
        self._bus = bus
        self._journal = journal
        self._objects = objects
        self._assembler = assembler
        self._deltas = deltas
        self.trust = trust
        self._clock = clock
        self._running: dict[str, tuple[int, ReportMark, Digest | None]] = {}
        """Enrolment, place and package of each gateway's newest report. Most repeat it and need no transaction."""

    # ---- events -------------------------------------------------------------------------------------------

    async def on_variant_optimized(self, variant: VariantOptimized, delivered: MessageContext) -> None:
        """Publishes the package of a chosen variant, once."""
        stream = store.stream(variant.model, variant.version, variant.profile)
        if not variant.chosen:
            return
        if await self._journal.transact(lambda unit: package_of(unit.load(stream)[0], variant)):
            return  # redelivered after it was published
        async with delivered.kept_alive():
            made = await self._assembler.assemble(variant, await self._base(variant))
        package = PackagePublished(
            model=variant.model,
            version=variant.version,
            profile=variant.profile,
            recipe=variant.recipe,
            variant=variant.digest,
            manifest=made.manifest,
            signature=made.signature,
            size_bytes=made.size_bytes,
            at=self._clock(),
        )

        def publish(unit: UnitOfWork) -> None:
            events, version = unit.load(stream)
            new = decide(events, variant, package)
            unit.append(stream, version, new)
            if new:  # in the same transaction: an announced package is always in the TUF repository
                self.trust.add(unit, package)

        await self._journal.transact(publish)

    async def on_membership(self, event: GatewayRevoked | GatewayRemoved, _delivered: MessageContext) -> None:
        await self._journal.transact(lambda unit: store.project(unit.connection, event))
        self._running.pop(event.gateway_id, None)

    async def on_enrolments(self, received: Batch[GatewayEnrolled]) -> Refused:
        """Records enrolments in one transaction: a new database reads those of the whole fleet."""

        def work(unit: UnitOfWork) -> None:
            for event, _ in received:
                store.project(unit.connection, event)

        await self._journal.transact(work)
        for event, _ in received:
            self._running.pop(event.gateway_id, None)
        return {}

    async def on_gateway_reports(self, received: Batch[GatewayReported]) -> Refused:
        """Records which packages gateways run, in one transaction. Most reports repeat it and need none."""
        newest: dict[str, tuple[int, ReportMark, Digest | None]] = {}
        changed: dict[str, tuple[GatewayReported, ReportMark]] = {}
        for event, delivered in received:
            name = event.gateway_id
            mark = ReportMark.of(event.boot, event.sequence, event.at, delivered.arrived_at, delivered.clock_ahead)
            enrolment, known, running = newest.get(name) or self._running.get(name, (0, NO_REPORT, ""))
            if not is_newer(event, mark, enrolment, known):
                continue  # delivered late
            if event.running != running or event.enrolment > enrolment:
                changed[name] = event, mark
            newest[name] = (max(event.enrolment, enrolment), mark, event.running)
        if changed:
            await self._journal.transact(lambda unit: store.record_reports(unit.connection, changed.values()))
        self._running.update(newest)
        return {}

    async def on_package_published(self, package: PackagePublished, delivered: MessageContext) -> None:
        """Makes deltas to a package.

        We consume our own event so that a restart does not lose this work and publishing does not wait for it.
        """
        async with delivered.kept_alive():
            await self._deltas.make_all(package)

    async def _base(self, variant: VariantOptimized) -> Digest | None:
        """Returns the package that contains the base of an adapter's variant.

        None if there is no such package, or if the variant is not an adapter.
        """
        if all(file.path != ADAPTER_PATH for file in variant.files):
            return None
        for package in reversed(await self._journal.read(store.packages)):
            if (package.profile, package.recipe) != (variant.profile, variant.recipe):
                continue
            if is_base(await self._objects.get_manifest(package.manifest.digest), variant):
                return package.manifest.digest
        log.warning(
            "no published package is the base of the adapter %s:%s; its package contains the base",
            variant.model,
            variant.version,
        )
        return None

    # ---- commands -----------------------------------------------------------------------------------------

    async def fetch(self, command: FetchPackage) -> PackageFiles:
        """Returns presigned URLs for the files of a package.

        Raises `Denied` when the gateway's plan does not name it, `NotReady` while its enrolment or plan is not known.
        """
        check_planned(await self._plan(command.gateway_id), command.manifest, command.gateway_id)
        return await self._files(command.manifest, command.have)

    async def bundle(self, command: PrepareBundle) -> BundleContents:
        """Returns everything that a bundle for a blueprint contains.

        Raises `NotReady` while there is no plan, `NotFound` for a package that was not published here.
        """
        envelope, plan = await self._plan_of(command.blueprint)
        timestamp, names = await self._journal.read(trust_metadata)
        packages = [await self._files(manifest, command.have) for manifest in sorted(planned(plan))]
        return BundleContents(
            blueprint=command.blueprint,
            plan=base64_text(envelope),
            timestamp=base64_text(timestamp),
            metadata=names,
            packages=tuple(packages),
        )

    async def withdraw(self, command: WithdrawPackage) -> Withdrawal:
        """Withdraws a package.

        Raises the errors of `WithdrawPackage`, and `SignatureInvalid` for a plan without a valid signature.
        """
        plans = [await self._plan_of(key) for key in await self._blueprints()]

        def work(unit: UnitOfWork) -> Withdrawal:
            package = only_match(store.all_packages(unit.connection), command)
            manifest = package.manifest.digest
            deltas = store.deltas_with(unit.connection, manifest)
            running = store.running(unit.connection).get(manifest, 0)
            if store.package(unit.connection, manifest) is not None:
                needing = [plan.blueprint for _, plan in plans if manifest in needed(plan)]
                check_not_needed(package, needing, 0 if command.even_if_running else running)
                if not command.dry_run:
                    now, stream = self._clock(), store.stream(package.model, package.version, package.profile)
                    unit.emit(stream, [withdrawn(package, command.reason, now)])
                    withdraw_deltas(unit, deltas, now)
                    self.trust.remove(unit, package)
            return Withdrawal(
                **package.model_dump(exclude={"variant"}),
                deltas=len(deltas),
                deltas_bytes=sum(delta.delta.size for delta in deltas),
                running=running,
                dry_run=command.dry_run,
            )

        return await self._journal.transact(work)

    async def _blueprints(self) -> list[str]:
        prefix = subjects.blueprint_key("")
        return [key.removeprefix(prefix) for key in await self._bus.client.desired_keys(subjects.blueprint_key("*"))]

    async def _files(self, digest: Digest, have: tuple[Digest, ...]) -> PackageFiles:
        package = await self._journal.read(lambda connection: store.package(connection, digest))
        if package is None:
            raise NotFound("this package was not published here, or it was withdrawn", where=digest)
        manifest = await self._objects.get_manifest(package.manifest.digest)
        layers = [presigned_file(self._objects, layer.annotations[FILE_PATH], layer) for layer in manifest.layers]
        return PackageFiles(
            manifest=await presigned_file(self._objects, MANIFEST_PATH, package.manifest),
            signature=await presigned_file(self._objects, SIGNATURE_PATH, package.signature),
            files=tuple(await asyncio.gather(*layers)),
            route=await self._route(package, have),
        )

    async def _route(self, package: PackagePublished, have: tuple[Digest, ...]) -> tuple[DeltaStep, ...]:
        """Returns the cheapest chain of deltas from a package that the gateway has.

        The gateway decides whether to use it, because it knows what else it has.
        """
        if not have:
            return ()
        await self._deltas.wait_until_made(package.manifest.digest)
        deltas = await self._journal.read(lambda connection: store.deltas_of(connection, package.model))
        return tuple([await self._step(delta) for delta in cheapest_route(deltas, have, package.manifest.digest)])

    async def _step(self, event: PackageDeltaPublished) -> DeltaStep:
        url = await self._objects.presigned_get(event.delta.digest)
        return DeltaStep(base=event.base, target=event.target, delta=event.delta, url=url)

    async def _plan(self, gateway_id: str) -> Plan:
        blueprint, revoked = await self._journal.read(
            lambda connection: (store.blueprint_of(connection, gateway_id), store.is_revoked(connection, gateway_id))
        )
        if revoked:
            raise CredentialRevoked(f"{gateway_id} was revoked, so it gets no packages")
        if blueprint is None:
            raise NotReady(f"the packager has not received the enrolment of {gateway_id} yet", where="packager")
        return (await self._plan_of(blueprint, in_time=True))[1]

    async def _plan_of(self, blueprint: str, *, in_time: bool = False) -> tuple[bytes, Plan]:
        """Returns the signed envelope of the newest plan, and the plan. `in_time` refuses an expired one.

        Raises `NotReady`, and `TrustRefused` for everything that the rollout service did not sign for this blueprint.
        """
        found = await self._bus.client.read_desired(subjects.blueprint_key(blueprint))
        if found is None:
            raise NotReady(f"there is no plan for {blueprint} yet", where="packager", fix="Apply the blueprint.")
        statement, _ = open_plan(found[0], await self.trust.rollout_keys())
        if statement.plan.blueprint != blueprint:
            what = f"this is the plan of {statement.plan.blueprint}, not of {blueprint}"
            raise refused(Attack.MIX_AND_MATCH, what, where="plan")
        if in_time and statement.expires_at <= self._clock():
            what = f"the newest available plan expired on {statement.expires_at:%Y-%m-%d}"
            raise refused(Attack.FREEZE, what, where="plan", fix="Start the rollout service; it signs the plan again.")
        return found[0], statement.plan


def routes(bus: Bus, handlers: Handlers) -> None:
    bus.on(VariantOptimized, handlers.on_variant_optimized)
    bus.on(PackagePublished, handlers.on_package_published)
    bus.on_batches(GatewayEnrolled, handlers.on_enrolments)
    bus.on(GatewayRevoked, handlers.on_membership)
    bus.on(GatewayRemoved, handlers.on_membership)
    bus.on_batches(GatewayReported, handlers.on_gateway_reports)
    bus.serve(FetchPackage, handlers.fetch)
    bus.serve(PrepareBundle, handlers.bundle)
    bus.serve(WithdrawPackage, handlers.withdraw)
    bus.serve(FetchMetadata, handlers.trust.fetch)
    bus.serve(DescribeTrust, handlers.trust.describe)
