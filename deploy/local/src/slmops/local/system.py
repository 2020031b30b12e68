"""The whole system: two servers, the services and some gateways, each its own process."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import signal
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slmops.contracts.errors import Conflict, SlmopsError, Unreachable
from slmops.contracts.permissions import PROVISIONER
from slmops.kit.bus import provisioner
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.clock import utc_now
from slmops.kit.settings import BusSettings
from slmops.kit.tls import client_context
from slmops.local.capacity import Capacity, capacity
from slmops.local.environment import SERVICES, GatewaySpec, default_gateways, gateway_spec, service_spec
from slmops.local.layout import ADMIN, Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.private import write_atomically
from slmops.local.process import ProcessSpec, ProcessState
from slmops.local.servers import NATS_PORTS, S3_PORTS, nats_spec, s3_spec
from slmops.local.supervisor import Supervisor

# The first start of a service reads hundreds of megabytes of libraries from disk.
_READY_WITHIN = timedelta(minutes=3)
_RENEW_EVERY = timedelta(hours=1)
log = logging.getLogger("slmops.local")


class System:
    """The system, with its data below `root`. A new start in the same folder continues with the same data.

    `fixed_ports` may contain `nats`, `nats.websocket`, `s3.api`, `<service>.http`, `<gateway>.http`, `<gateway>.api`.
    All other ports are free ones. `hosts` are further names in the servers' certificates. `api_tls`: TLS for the
    gateways' OpenAI APIs too.
    """

    def __init__(
        self,
        root: Path,
        *,
        services: Sequence[str] = SERVICES,
        gateways: Sequence[GatewaySpec] = default_gateways(),
        fixed_ports: Mapping[str, int] | None = None,
        hosts: Sequence[str] = (),
        api_tls: bool = False,
    ) -> None:
        self.layout = Layout(root.resolve())
        self.certificates = replace(self.layout.certificates, hosts=tuple(hosts))
        self._api_scheme = "https" if api_tls else "http"
        self._services = services
        self._gateways = gateways
        self._fixed = dict(fixed_ports or {})
        self._supervisor = Supervisor(self.layout.state_file)
        self._lock_files = ExitStack()
        self._renewal: asyncio.Task[None] | None = None
        self.capacity: Capacity | None = None
        """What the disk allows; measured by `start`."""

    async def start(self, on_event: Callable[[ProcessState], None] | None = None) -> None:
        """Starts everything and returns when all processes are ready. After an error, no process is left running.

        Raises `PortTaken`, `Unreachable`, `Conflict`, `Denied`, `DiskFull`, `IncompatibleFolder`.
        """
        self.layout.create()
        self._lock()
        self._supervisor = Supervisor(self.layout.state_file, on_event)
        try:
            self.layout.prepare()
            room = self.capacity = capacity(self.layout.root, self.layout.nats_store)
            ports = self._ports(self._port_names())
            await asyncio.to_thread(self.certificates.renew, utc_now())
            await _gather_or_cancel(
                self._start_server(lambda ports: self._nats_spec(ports, room.store_bytes), NATS_PORTS),
                self._start_server(lambda ports: s3_spec(self.layout, ports, self.certificates), S3_PORTS),
            )
            await provisioner.run(self.bus_settings(PROVISIONER, stream_bytes=room.stream_bytes))
            ports = self._ports([])
            await self._start_all(service_spec(self.layout, ports, service) for service in self._services)
            api_tls = self._api_scheme == "https"
            await self._start_all(
                gateway_spec(self.layout, ports, gateway, api_tls=api_tls) for gateway in self._gateways
            )
            self._write_client_file(ports)
            self._renewal = asyncio.create_task(self._renew_certificates(), name="renew certificates")
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stops everything in reverse order. A second call does nothing."""
        try:
            await cancel_and_wait([self._renewal] if self._renewal else [])
            await self._supervisor.stop()
        finally:
            self._lock_files.close()

    @property
    def gateways(self) -> Sequence[GatewaySpec]:
        return self._gateways

    @property
    def nats_url(self) -> str:
        """The URL of the bus. Only valid after `start`."""
        return f"tls://{HOST}:{self._ports([])['nats']}"

    def bus_settings(self, user: str, **settings: Any) -> BusSettings:
        """Returns the settings with which a user of this system connects to the bus. Only valid after `start`."""
        ours: dict[str, Any] = {
            "nats_url": self.nats_url,
            "nats_creds": self.layout.creds(user),
            "tls_ca": self.certificates.trusted,
        }
        return BusSettings(**(ours | settings))

    @property
    def verify(self) -> ssl.SSLContext:
        """What httpx and other clients need to verify the servers. Only valid after `start`."""
        return client_context(self.certificates.trusted)

    @property
    def s3_endpoint(self) -> str:
        """host:port of the object store. Only valid after `start`."""
        return f"{HOST}:{self._ports([])['s3.api']}"

    def api_url(self, gateway_id: str) -> str:
        """Returns the URL of a gateway's OpenAI-compatible API. Only valid after `start`."""
        return f"{self._api_scheme}://{HOST}:{self._ports([])[f'{gateway_id}.api']}"

    async def kill(self, name: str) -> None:
        """Sends SIGKILL to one process, which is then restarted. Raises `NotFound`."""
        await self._supervisor.kill(name)

    def states(self) -> list[ProcessState]:
        return self._supervisor.states()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def _lock(self) -> None:
        """Locks the folder, so that only one system uses it. The kernel releases the lock when the process ends."""
        file = self._lock_files.enter_context(self.layout.lock_file.open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock_files.close()
            raise Conflict(
                "another slmops uses this data folder",
                where=str(self.layout.root),
                fix="Stop it (slmops down), or use another folder with --data.",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))  # for `slmops down`
        file.flush()

    def _port_names(self) -> list[str]:
        gateways = [gateway.id for gateway in self._gateways]
        http = [f"{name}.http" for name in (*self._services, *gateways)]
        return [*NATS_PORTS, *S3_PORTS, *http, *(f"{name}.api" for name in gateways)]

    def _ports(self, names: Iterable[str]) -> dict[str, int]:
        return choose_ports(self.layout.ports_file, names, self._fixed)

    async def _start_server(self, spec: Callable[[dict[str, int]], ProcessSpec], port_names: Sequence[str]) -> None:
        """Starts a server. If another process took its port after the choice, chooses again."""
        ports = self._ports([])
        while True:
            try:
                return await self._supervisor.start(spec(ports), _READY_WITHIN)
            except Unreachable:
                tried, ports = ports, self._ports(port_names)
                if ports == tried:
                    raise

    async def _start_all(self, specs: Iterable[ProcessSpec]) -> None:
        await _gather_or_cancel(*(self._supervisor.start(spec, _READY_WITHIN) for spec in specs))

    def _nats_spec(self, ports: Mapping[str, int], store_bytes: int) -> ProcessSpec:
        websocket = ports["nats.websocket"]
        return nats_spec(
            self.layout, ports["nats"], store_bytes, certificates=self.certificates, websocket_port=websocket
        )

    async def _renew_certificates(self) -> None:
        """Renews certificates before they expire. No process restarts: services and clients read changed files by
        themselves, SeaweedFS within 5 hours, and NATS after a signal."""
        while True:
            await asyncio.sleep(_RENEW_EVERY.total_seconds())
            try:
                renewed = await asyncio.to_thread(self.certificates.renew, utc_now())
            except SlmopsError:
                log.exception("cannot renew the certificates")
                continue
            if renewed:
                log.info("renewed the certificates of %s", ", ".join(renewed))
            if "nats" in renewed:
                self._supervisor.signal("nats", signal.SIGHUP)

    def _write_client_file(self, ports: Mapping[str, int]) -> None:
        """Writes the file with which the command line finds the system. It contains no S3 key."""
        client = {
            "nats_url": self.nats_url,
            "nats_websocket_url": f"wss://{HOST}:{ports['nats.websocket']}",
            "tls_ca": str(self.certificates.trusted),
            "nats_creds": str(self.layout.creds(ADMIN)),
            "gateways": {gateway.id: self.api_url(gateway.id) for gateway in self._gateways},
            "trace_file": str(self.layout.trace("console")),
            "traces": str(self.layout.traces),
            "supervisor": os.getpid(),
        }
        write_atomically(self.layout.client_file, json.dumps(client, indent=2))


async def _gather_or_cancel(*starts: Awaitable[None]) -> None:
    """Awaits all. The first error cancels the others and is raised alone."""
    tasks = [asyncio.ensure_future(start) for start in starts]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        await cancel_and_wait(tasks)
        raise
