"""What clients and load balancers may see of the fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from servegym.serve.router.errors import RequestError
from servegym.serve.router.health import Health
from servegym.serve.router.reply import Reply, json_reply

#: Beginning of the path of a model's page.
MODEL = "/v1/models/"


class Pages:
    """The pages of `/health`, `/metrics`, `/v1/models` and of each model.

    Args:
        health: Knows the replicas and their models.
        metrics_page: Returns the Prometheus page.
    """

    def __init__(self, health: Health, metrics_page: Callable[[], Reply]) -> None:
        self._health = health
        self._metrics_page = metrics_page

    def reply(self, path: str, *, stopping: bool) -> Reply:
        """Return the page at a path.

        Args:
            path: One of the above, without what is quoted in URLs.
            stopping: Whether the router takes no more requests.

        Raises:
            RequestError: If it is of a model that is not there.
        """
        if path == "/health":
            return self._health_page(stopping)
        if path == "/metrics":
            return self._metrics_page()
        models = self._health.models()
        name = path.removeprefix(MODEL)
        if name == path:
            return json_reply({"object": "list", "data": [models[one] for one in sorted(models)]})
        if name not in models:
            raise no_model(name, models)
        return json_reply(models[name])

    def _health_page(self, stopping: bool) -> Reply:
        """Say whether requests may be sent here."""
        num_up, num_replicas = self._health.counts()
        status = "stopping" if stopping else "ok" if num_up else "no replica"
        return json_reply(
            {"status": status, "replicas_up": num_up, "replicas": num_replicas},
            status=200 if status == "ok" else 503,
        )


def no_model(name: str, models: Iterable[str]) -> RequestError:
    """Make the error of a request for a model that no replica has."""
    known = ", ".join(sorted(models)) or "none yet"
    return RequestError(404, f"there is no model {name!r}, only {known}", "model_not_found")


def no_replica(retry_after_s: float, missing: str = "replica") -> RequestError:
    """Make the error of a request that no replica takes, or none of those that are `missing`."""
    return RequestError(
        503,
        f"no {missing} takes requests now: come again later",
        "no_replica",
        retry_after_s=retry_after_s,
    )
