"""What operators may do, on a port of its own that only this machine can reach."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from servegym.documents import one_sentence
from servegym.errors import ConfigError, ServeGymError
from servegym.serve.dispatcher import Dispatcher
from servegym.serve.router.errors import RequestError
from servegym.serve.router.fleet import CONFIGURED, OPERATOR, Fleet, Member, TakenError
from servegym.serve.router.health import Health
from servegym.serve.router.replica import ReplicaConfig
from servegym.serve.router.reply import Reply

_log = logging.getLogger(__name__)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_B = TypeVar("_B", bound=BaseModel)


class DrainBody(_Body):
    """Of `POST /drain` and `/undrain`."""

    replica: str


class PolicyBody(_Body):
    """Of `POST /policy`; without a policy the one in place is loaded again."""

    policy: str | None = None


class ModeBody(_Body):
    """Of `POST /mode`; what is left out stays."""

    mode: Literal["live", "shadow"] | None = None
    canary_fraction: float | None = Field(None, ge=0, le=1)


@web.middleware
async def _only_operators(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Refuse what a web page on this machine could send, and answer errors as the router does."""
    try:
        if request.headers.get("Origin") is not None:
            raise RequestError(403, "browsers have no business here", "forbidden")
        if request.method == "POST" and request.content_type != "application/json":
            raise RequestError(415, "the body must be application/json", "unsupported_media_type")
        return await handler(request)
    except RequestError as error:
        return _response(error.reply())
    except ServeGymError as error:
        return _response(RequestError(400, str(error), "refused").reply())


class Admin:
    """The endpoints that operators use.

    Args:
        dispatcher: To change and to show.
        health: To drain replicas.
        fleet: To change.
        metrics_page: Returns the Prometheus page.
        ready: Returns whether requests may be sent here.
        workers: Returns process id and number of requests of those who carry them.
        peers: Returns what is known of other routers.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        health: Health,
        fleet: Fleet,
        metrics_page: Callable[[], Reply],
        ready: Callable[[], Reply],
        workers: Callable[[], list[dict[str, int]]],
        peers: Callable[[], list[dict[str, object]]],
    ) -> None:
        self._dispatcher = dispatcher
        self._health = health
        self._fleet = fleet
        self._metrics_page = metrics_page
        self._ready = ready
        self._workers = workers
        self._peers = peers
        self._loading = asyncio.Lock()

    def app(self) -> web.Application:
        """Make the application that answers operators."""
        app = web.Application(middlewares=[_only_operators], client_max_size=64 * 1024)
        app.router.add_post("/drain", self._drain)
        app.router.add_post("/undrain", self._undrain)
        app.router.add_get("/replicas", self._replicas)
        app.router.add_post("/replicas", self._add)
        app.router.add_delete("/replicas/{name:.+}", self._remove)
        app.router.add_post("/policy", self._policy)
        app.router.add_post("/mode", self._mode)
        app.router.add_get("/state", self._state)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        return app

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return _response(self._metrics_page())

    async def _livez(self, request: web.Request) -> web.StreamResponse:
        """Say that the loop turns; whether there are replicas is no reason to restart a router."""
        return web.json_response({"status": "alive"})

    async def _readyz(self, request: web.Request) -> web.StreamResponse:
        return _response(self._ready())

    async def _drain(self, request: web.Request) -> web.StreamResponse:
        return await self._set_draining(request, True)

    async def _undrain(self, request: web.Request) -> web.StreamResponse:
        return await self._set_draining(request, False)

    async def _set_draining(self, request: web.Request, draining: bool) -> web.StreamResponse:
        name = (await _read(request, DrainBody)).replica
        replica = self._member(name).slot
        self._health.drain(replica, draining)
        left = self._dispatcher.state.outstanding(replica)
        verb = "drains" if draining else "takes requests again"
        _told(request, f"{name} {verb}, with {left} requests in progress")
        return web.json_response(
            {"replica": name, "draining": draining, "outstanding_requests": left}
        )

    async def _replicas(self, request: web.Request) -> web.StreamResponse:
        """List the fleet, those that leave it last."""
        here = [(member, False) for member in self._fleet]
        return web.json_response(
            [
                self._summary(member, leaving=leaving)
                for member, leaving in [*here, *((gone, True) for gone in self._fleet.leaving)]
            ]
        )

    async def _add(self, request: web.Request) -> web.StreamResponse:
        replica = await _read(request, ReplicaConfig)
        try:
            member = await self._fleet.add(replica)
        except TakenError as error:
            raise RequestError(409, str(error), "refused") from error
        _told(request, f"{replica.name} is added, at {replica.shown_url}")
        return web.json_response(self._summary(member, leaving=False), status=201)

    async def _remove(self, request: web.Request) -> web.StreamResponse:
        member = self._member(request.match_info["name"])
        if member.source not in (CONFIGURED, OPERATOR):
            raise RequestError(
                409,
                f"{member.replica.name} comes from {member.source}, which would bring it back: "
                "take it out there, or drain it",
                "refused",
            )
        self._fleet.remove(member.replica.name)
        left = self._dispatcher.state.outstanding(member.slot)
        _told(request, f"{member.replica.name} is removed, with {left} requests in progress")
        return web.json_response({"replica": member.replica.name, "outstanding_requests": left})

    def _member(self, name: str) -> Member:
        try:
            return self._fleet[name]
        except ConfigError as error:
            raise RequestError(404, str(error), "unknown_replica") from error

    def _summary(self, member: Member, *, leaving: bool) -> dict[str, object]:
        state = self._dispatcher.state
        return {
            "name": member.replica.name,
            "url": member.replica.url,
            "source": member.source,
            "role": member.replica.role,
            "takes_requests": not leaving and state.is_up(member.slot),
            "leaving": leaving,
            "outstanding_requests": state.outstanding(member.slot),
        }

    async def _policy(self, request: web.Request) -> web.StreamResponse:
        """Load a policy beside the traffic; only a good one takes the old one's place."""
        runtime = self._dispatcher.runtime
        text = (await _read(request, PolicyBody)).policy
        async with self._loading:
            wanted = text or (runtime.loaded.text if runtime.loaded else runtime.config.policy)
            try:
                loaded = await asyncio.to_thread(runtime.prepare, wanted)
            except ServeGymError as error:
                runtime.counters.num_refused += 1
                _told(request, f"the policy {wanted!r} is refused: {error}")
                raise
            before = runtime.loaded.version if runtime.loaded else "none"
            runtime.install(loaded)
            _told(request, f"the policy is {loaded.text!r} ({loaded.version}), it was {before}")
        return web.json_response({"policy": loaded.text, "version": loaded.version})

    async def _mode(self, request: web.Request) -> web.StreamResponse:
        runtime = self._dispatcher.runtime
        body = await _read(request, ModeBody)
        before = (runtime.mode, runtime.canary_fraction)
        if body.mode is not None:
            runtime.mode = body.mode
        if body.canary_fraction is not None:
            runtime.canary_fraction = body.canary_fraction
        _told(
            request,
            f"the mode is {runtime.mode} with a canary of {runtime.canary_fraction:g}, "
            "it was {} with {:g}".format(*before),
        )
        return web.json_response({"mode": runtime.mode, "canary_fraction": runtime.canary_fraction})

    async def _state(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self._describe())

    def _describe(self) -> dict[str, object]:
        dispatcher, state, now_s = (
            self._dispatcher,
            self._dispatcher.state,
            self._dispatcher.clock(),
        )
        replicas, sizes = [], dispatcher.index.sizes()
        transfers = dispatcher.placing.transfers
        for r, health in sorted(self._health.replicas.items()):
            standing = self._health.ejection.standings[r]
            age_s = state.metrics_age_s(r, now_s)
            features = state.describe(r) | {"metrics_age_s": age_s}
            replicas.append(
                {
                    "name": dispatcher.names[r],
                    "role": transfers.role(r),
                    "takes_requests": state.is_up(r),
                    "healthy": health.up,
                    "draining": health.draining,
                    "leaving": health.leaving,
                    "share_of_full_load": self._health.slow_start.share(r),
                    "ejected_s": max(0.0, standing.ejected_until_s - now_s),
                    "on_trial": standing.on_trial,
                    "silent": standing.silent,
                    "ejections": standing.num_ejections,
                    "models": sorted(health.models),
                    "prefix_blocks": sizes[r],
                    "features": features,
                }
            )
        return {
            "runtime": dispatcher.runtime.status(),
            "workers": self._workers(),
            "peers": self._peers(),
            "held_requests": state.num_held,
            "arrival_rate_rps": state.arrival_rate_rps,
            "replicas": replicas,
        }


def _response(reply: Reply) -> web.Response:
    return web.Response(status=reply.status, body=reply.body, headers=reply.headers)


def _told(request: web.Request, what: str) -> None:
    """Leave a line of what an operator has done."""
    _log.warning("operator at %s: %s", request.remote, what)


async def _read(request: web.Request, model: type[_B]) -> _B:
    try:
        data = json.loads(await request.read() or b"{}")
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}", "invalid_json") from error
    try:
        return model.model_validate(data)
    except ValidationError as error:
        message = one_sentence(error, data, model)
        raise RequestError(400, message, "invalid_request") from error
