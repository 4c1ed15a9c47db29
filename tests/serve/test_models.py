"""Several models and adapters behind one router."""

from __future__ import annotations

import json

from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Rates, fleet_facts

from .running import RATES, VirtualTimeLoop, run, running, until


async def names(it, model: str, num: int = 6) -> set[str]:
    """Return which replicas answer requests for a model."""
    answers = [await it.post({"prompt": "hi", "model": model}) for _ in range(num)]
    assert {status for status, _, _ in answers} == {200}
    return {headers["X-Servegym-Replica"] for _, _, headers in answers}


def test_requests_for_an_adapter_go_where_it_is_loaded():
    async def test():
        async with running(3, health={"models_interval_s": 0.05}) as it:
            it.replicas[2].model = "other"
            it.replicas[0].adapters = ["sql"]
            await until(lambda: set(it.router._health.models()) == {"m", "other", "sql"})
            assert await names(it, "m") == {"r0", "r1"}
            assert await names(it, "sql") == {"r0"}
            assert await names(it, "other") == {"r2"}
            _, text = await it.get("/v1/models")
            parents = {model["id"]: model["parent"] for model in json.loads(text)["data"]}
            assert parents == {"m": None, "other": None, "sql": "m"}
            # the replica gets the name as it was asked for
            assert it.replicas[0].bodies[-1]["model"] == "sql"
            it.replicas[1].adapters = ["sql"]
            await until(lambda: it.router._health.serves(1, "sql"))
            assert await names(it, "sql") == {"r0", "r1"}
            it.replicas[0].adapters, it.replicas[1].adapters = [], []
            await until(lambda: "sql" not in it.router._health.models())
            status, said, _ = await it.post({"prompt": "hi", "model": "sql"})
            assert (status, json.loads(said)["error"]["code"]) == (404, "model_not_found")

    run(test, loop=VirtualTimeLoop)


def test_a_replica_that_comes_brings_its_models():
    async def test():
        async with running(2) as it:
            it.replicas[1].model = "other"
            status, _, _ = await it.post({"prompt": "hi", "model": "other"})
            assert status == 404
            async with it.client.delete(f"{it.admin}/replicas/r1") as response:
                assert response.status == 200
            again = {"name": "r1", "url": it.replicas[1].url, "rates": RATES}
            await it.operate("/replicas", again)
            await until(lambda: "other" in it.router._health.models())
            assert await names(it, "other") == {"r1"}

    run(test)


def test_what_one_model_has_cached_another_has_not():
    rates = Rates(**RATES, kv_capacity_tokens=100_000)
    dispatcher = Dispatcher(DispatchConfig(), ["a"], fleet_facts([rates]))
    prompt = list(range(640))
    job = dispatcher.arrive(prompt, key="1", model="base")
    dispatcher.decide(job)
    dispatcher.finish(job, 1)
    hits = {}
    for model in ("base", "adapter", ""):
        again = dispatcher.arrive(prompt, key="2", model=model)
        hits[model] = dispatcher.index.leading_blocks(again.prompt.keys).tolist()
    assert hits == {"base": [40.0], "adapter": [0.0], "": [0.0]}
