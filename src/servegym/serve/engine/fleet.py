"""Replicas of a scenario in one process, and the switch for their faults."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from servegym.errors import ConfigError
from servegym.scenario import Scenario
from servegym.serve.engine.core import Noise, rehearse
from servegym.serve.engine.faults import Fault
from servegym.serve.engine.handovers import Handovers
from servegym.serve.engine.metrics import EngineMetrics
from servegym.serve.engine.replica import Replica
from servegym.serve.engine.roles import Links, make_replica, rehearse_roles
from servegym.serve.engine.server import EngineServer

#: Answers whose lengths stand for the scenario's workload.
_NUM_LENGTHS = 4096


@dataclass(frozen=True)
class FleetConfig:
    """Which replicas of a scenario to serve, and how.

    Attributes:
        scenario: Gives replica types, step noise and output lengths.
        replicas: Indices of the replicas; None is all.
        host: Address to listen on.
        port: Port of the first replica, the others follow; 0 takes free ones.
        admin_port: Loopback port of the fault switch; 0 takes a free one, None is no switch.
        speed: Seconds of the replicas' clocks in one real second.
        stream_interval: Tokens in one event of a stream.
        seed: Of the episode that says which replicas there are, and of noise.
        model_name: As clients must name it; None is the scenario's.
        faults: What will happen by itself.
        stamped: Whether events tell when they were sent, for those who measure what lies between.
    """

    scenario: Scenario
    replicas: Sequence[int] | None = None
    host: str = "127.0.0.1"
    port: int = 8100
    admin_port: int | None = None
    speed: float = 1.0
    stream_interval: int = 1
    seed: int = 0
    model_name: str | None = None
    faults: Sequence[Fault] = ()
    stamped: bool = False


class Fleet:
    """Engine servers on consecutive ports.

    Args:
        config: What to serve.

    Attributes:
        servers: By replica.
        admin_url: Of the fault switch; empty without one.

    Raises:
        ConfigError: If the scenario has no such replica, or a setting is impossible.
    """

    def __init__(self, config: FleetConfig) -> None:
        if not 0 < config.speed < math.inf:
            raise ConfigError(f"speed must be above 0 and finite, got {config.speed}")
        retain_kv_s = config.scenario.spec.retain_kv_s
        if retain_kv_s > 0:
            raise ConfigError(
                f"retain_kv_s is {retain_kv_s}, but an emulated engine is not told which answers "
                "others wait for: leave it out of the scenario"
            )
        self._has_roles = config.scenario.spec.disaggregated
        if self._has_roles and config.scenario.spec.transfers.reservation != "source":
            raise ConfigError(
                "emulated engines hand KV over as vLLM does with NIXL: take reservation: source, "
                f"got {config.scenario.spec.transfers.reservation}"
            )
        if any(kind.pipeline for kind in config.scenario.spec.types):
            raise ConfigError(
                "emulated engines have one batch in flight: set pipeline_parallel_size to 1 in the "
                "scenario's fleet"
            )
        if any(kind.speculation for kind in config.scenario.spec.types):
            raise ConfigError(
                "emulated engines send one token at a time: leave speculative_config out of the "
                "scenario's fleet"
            )
        if config.scenario.spec.migrates:
            raise ConfigError(
                "emulated engines keep their requests: take a scenario without migration"
            )
        if config.scenario.spec.tiered:
            raise ConfigError(
                "emulated engines keep KV on their GPUs alone: leave host_kv, disk_kv, kv_store "
                "and balancing_threshold out of the scenario"
            )
        self._config = config
        self._episode = config.scenario.episode(config.seed, num_requests=_NUM_LENGTHS)
        there = range(self._episode.num_replicas)
        self._chosen = list(there if config.replicas is None else config.replicas)
        for index in self._chosen:
            if index not in there:
                raise ConfigError(f"the scenario has replicas 0 to {there[-1]}, got {index}")
        if self._has_roles and self._chosen != list(there):
            raise ConfigError(
                "replicas with roles fetch KV from each other: serve all of them, without --replica"
            )
        for fault in config.faults:
            self._check(fault)
        spec = config.scenario.spec
        self._links = Links()
        self._handovers = Handovers(spec.transfers.lease_s / config.speed)
        self._other_ends = tuple(kind for kind in spec.types if kind.role == "prefill")
        self._origin_s = time.monotonic()
        self.servers: dict[int, EngineServer] = {}
        self.admin_url = ""
        self._admin: web.AppRunner | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def _check(self, fault: Fault) -> None:
        if fault.replica not in self._chosen:
            served = ", ".join(map(str, self._chosen))
            raise ConfigError(f"replica {fault.replica} is not served here: choose one of {served}")

    async def start(self) -> None:
        """Listen on all ports.

        Raises:
            ConfigError: If one of them cannot be had; then none is.
        """
        config = self._config
        kind = config.scenario.spec.types[int(self._episode.type_idx[self._chosen[0]])]
        rehearse(replace(kind, role="mixed"))
        if self._has_roles:
            rehearse_roles(kind, config.scenario.spec.transfers)
        try:
            for k, index in enumerate(self._chosen):
                server = self._make(index)
                self.servers[index] = server
                await server.start(config.host, config.port + k if config.port else 0)
            if config.admin_port is not None:
                await self._start_admin(config.admin_port)
        except ConfigError:
            await self.stop()
            raise
        loop = asyncio.get_running_loop()
        for fault in config.faults:
            self._timers.append(loop.call_later(fault.at_s, self._begin, fault))

    def _make(self, index: int) -> EngineServer:
        config, spec, episode = self._config, self._config.scenario.spec, self._episode
        model_name = config.model_name or config.scenario.model
        kind = spec.types[int(episode.type_idx[index])]
        metrics = EngineMetrics(model_name, config.speed, kind.engine)
        lengths = episode.table.output_tokens
        settings: dict[str, Any] = {
            "block_size": spec.block_size,
            "prefix_caching": spec.prefix_caching,
            "chunked_prefill": spec.chunked_prefill,
            "speed": float(episode.speed[index]),
            "noise": Noise(spec.noise_sigma, spec.noise_period_steps, episode.noise_seed, index),
            "stream_interval": config.stream_interval,
        }
        replica: Replica
        if self._has_roles:
            replica = make_replica(
                kind,
                metrics,
                transfers=spec.transfers,
                other_ends=self._other_ends,
                links=self._links,
                **settings,
            )
        else:
            replica = Replica(kind, metrics, **settings)
        return EngineServer(
            index,
            replica,
            metrics,
            model_name=model_name,
            speed=config.speed,
            draw_tokens=lambda digest: int(lengths[int.from_bytes(digest[:8]) % len(lengths)]),
            stamped=config.stamped,
            role=kind.role,
            handovers=self._handovers,
            source_kinds=self._source_kinds,
            origin_s=self._origin_s,
        )

    @property
    def _source_kinds(self) -> dict[int, int]:
        """The kind of each replica that prefills, among those that KV comes from."""
        types = self._config.scenario.spec.types
        kinds = {r: types[int(t)] for r, t in enumerate(self._episode.type_idx)}
        return {r: self._other_ends.index(k) for r, k in kinds.items() if k.role == "prefill"}

    async def stop(self) -> None:
        """Stop all servers and the faults still to come."""
        for timer in self._timers:
            timer.cancel()
        self._handovers.stop()
        if self._admin is not None:
            await self._admin.cleanup()
        for server in self.servers.values():
            await server.stop()

    async def apply(self, fault: Fault) -> None:
        """Let a fault happen now, or end.

        Raises:
            ConfigError: If its replica is not served here.
        """
        self._check(fault)
        await self.servers[fault.replica].apply(fault)

    def _begin(self, fault: Fault) -> None:
        task = asyncio.get_running_loop().create_task(self.apply(fault))
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)

    async def _start_admin(self, port: int) -> None:
        app = web.Application()
        app.add_routes([web.get("/state", self._state), web.post("/faults", self._post_fault)])
        self._admin = web.AppRunner(app, access_log=None)
        await self._admin.setup()
        site = web.TCPSite(self._admin, "127.0.0.1", port)
        try:
            await site.start()
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen on 127.0.0.1:{port}: choose another --admin-port"
            ) from error
        self.admin_url = f"http://127.0.0.1:{self._admin.addresses[0][1]}"

    async def _state(self, _: web.Request) -> web.Response:
        return web.json_response([server.state() for server in self.servers.values()])

    async def _post_fault(self, http: web.Request) -> web.Response:
        try:
            await self.apply(_fault(await http.text()))
        except ConfigError as error:
            return web.json_response({"error": str(error)}, status=400)
        return await self._state(http)


#: What JSON of another form, numbers too large or nesting too deep raise.
_NO_FAULT = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


def _fault(body: str) -> Fault:
    """Read `{"replica": 0, "kind": "slow", "value": 10}`."""
    try:
        data = json.loads(body)
        return Fault(int(data["replica"]), str(data["kind"]), float(data.get("value", 1.0)))
    except _NO_FAULT as error:
        raise ConfigError(
            'a fault is an object such as {"replica": 0, "kind": "slow", "value": 10}'
        ) from error
