"""Where the dispatcher is: requests are admitted here, and placed (`local_placement`)."""

from __future__ import annotations

from servegym.serve.dispatcher import Dispatcher
from servegym.serve.router.books import Books
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.errors import RequestError
from servegym.serve.router.health import Health
from servegym.serve.router.limits import Limits
from servegym.serve.router.line import Line
from servegym.serve.router.local_placement import LocalPlacement
from servegym.serve.router.pages import Pages
from servegym.serve.router.reply import Reply
from servegym.serve.router.retry_budget import RetryBudget
from servegym.serve.router.split_placement import SplitPlacement
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.router.timers import Timers


class LocalDesk:
    """The one place where requests are admitted and placed.

    Args:
        config: Of the router.
        dispatcher: Decides.
        health: Knows who is up and has which model, and is told what becomes of requests.
        telemetry: Counts.
        pages: What clients may see of the fleet.

    Attributes:
        stopping: Whether requests had better go elsewhere, as `/health` says.
        urls: Of the replicas' servers, by slot.
        bootstrap_ports: Of the replicas that are SGLang servers and prefill, by slot.
        line: Of requests that wait for a replica with room.
        timers: For what is assumed of requests.
    """

    def __init__(
        self,
        config: RouterConfig,
        dispatcher: Dispatcher,
        health: Health,
        telemetry: Telemetry,
        pages: Pages,
    ) -> None:
        self.config = config
        self.dispatcher = dispatcher
        self.health = health
        self.telemetry = telemetry
        self.stopping = False
        self.limits = Limits(config.limits, config.tenants)
        self.budget = RetryBudget(
            config.request.retry_share, config.request.retry_reserve, dispatcher.clock
        )
        self.books = Books(dispatcher, health, telemetry)
        self.urls: dict[int, str] = {}
        self.bootstrap_ports: dict[int, int] = {}
        self.line = Line()
        self.timers = Timers()
        self._pages = pages

    def add(self, replica: int, url: str) -> None:
        """A replica has joined.

        Args:
            replica: Its slot.
            url: Of its server.
        """
        self.urls[replica] = url

    def remove(self, replica: int) -> None:
        """A replica has gone, after its last request."""
        del self.urls[replica]
        self.bootstrap_ports.pop(replica, None)

    def enter(self, tenant: str, key: str) -> LocalPlacement:
        """Admit a request; see `Desk`.

        Raises:
            RequestError: If the tenant has too many.
        """
        self.limits.enter(tenant, self.dispatcher.clock())
        self.telemetry.in_flight += 1
        if self.dispatcher.placing.transfers.are_possible:
            return SplitPlacement(self, tenant, key)
        return LocalPlacement(self, tenant, key)

    def come_again(self, status: int, message: str, code: str) -> RequestError:
        """Make the error of a request that may be served later."""
        retry_after_s = self.config.request.retry_after_s
        return RequestError(status, message, code, retry_after_s=retry_after_s)

    def count(self, endpoint: str, status: int, times: int = 1) -> None:
        """See `Desk`."""
        self.telemetry.requests[endpoint, status] += times

    async def page(self, path: str) -> Reply:
        """See `Desk`."""
        return self.show(path)

    def show(self, path: str) -> Reply:
        """Return what a path shows of the fleet; see `Desk`."""
        return self._pages.reply(path, stopping=self.stopping)
