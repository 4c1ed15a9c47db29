"""One look at every replica that a configuration names: is it there, and what it seems to be?"""

from __future__ import annotations

import asyncio
import os

import aiohttp

from servegym.serve.discovery.sources import first_look
from servegym.serve.monitoring.metrics import MetricNames, MetricsError, metric_names
from servegym.serve.monitoring.poller import fetch_metrics
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.replica import ReplicaConfig, read_replicas


async def probe(config: RouterConfig) -> list[str]:
    """Ask every replica for its health, its models and its metrics.

    Args:
        config: Whose replicas; how long each question may take is its `health.timeout_s` and
            `metrics.timeout_s`.

    Returns:
        One sentence for each thing that is wrong, sources first, then replica by replica.

    Raises:
        ConfigError: If the metrics' names or the file of replicas cannot be read.
    """
    names = metric_names(config.metrics.engine)
    replicas: list[ReplicaConfig] = [*config.replicas]
    wrong: list[str] = []
    if config.replicas_file is not None:
        replicas += read_replicas(config.replicas_file)
    if config.discover is not None:
        found, wrong = await first_look(config.discover)
        replicas += found
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        answers = await asyncio.gather(
            *(_look(config, names, replica, session) for replica in replicas)
        )
    wrong += [f"{r.name}: {s}" for r, said in zip(replicas, answers, strict=True) for s in said]
    return wrong


async def _look(
    config: RouterConfig,
    names: MetricNames | None,
    replica: ReplicaConfig,
    session: aiohttp.ClientSession,
) -> list[str]:
    health_s = config.health.timeout_s
    health, _ = await _get(session, replica.url + config.health.path, health_s)
    if isinstance(health, str):
        return [f"{replica.shown_url}{config.health.path} {health}: start it, or correct its url"]
    wrong = []
    if health >= 300:
        wrong.append(
            f"{replica.shown_url}{config.health.path} answers {health}: correct its url, or name "
            "the page for health checks in health.path"
        )
    wrong += await _look_at_models(config, replica, session)
    page = replica.metrics_page
    try:
        await fetch_metrics(session, page, names, config.metrics.timeout_s)
    except MetricsError as error:
        wrong.append(f"{page}: {error}")
    return wrong


async def _look_at_models(
    config: RouterConfig, replica: ReplicaConfig, session: aiohttp.ClientSession
) -> list[str]:
    key = os.environ.get(config.upstream_key_env or "", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    asked, url = f"{replica.url}/v1/models", f"{replica.shown_url}/v1/models"
    status, data = await _get(session, asked, config.health.timeout_s, headers)
    if isinstance(status, str):
        return [f"{url} {status}: correct its url"]
    if status in (401, 403):
        return [f"{url} answers {status}: name the variable with its API key in upstream_key_env"]
    models = data.get("data") if isinstance(data, dict) else None
    if status != 200 or not isinstance(models, list):
        return [f"{url} answers {status} and no list of models: correct its url"]
    return []


async def _get(
    session: aiohttp.ClientSession,
    url: str,
    timeout_s: float,
    headers: dict[str, str] | None = None,
) -> tuple[int | str, object]:
    """Ask for a page; return its status, or in words why there is none, and what JSON it holds."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.get(url, timeout=timeout, headers=headers) as response:
            data: object = None
            if response.content_type == "application/json":
                data = await response.json()
            return response.status, data
    except TimeoutError:
        return f"has not answered in {timeout_s:g} s", None
    except aiohttp.ClientConnectorError as error:
        return f"cannot be reached ({error.os_error.strerror or error.os_error})", None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return f"gives no proper answer ({type(error).__name__})", None
