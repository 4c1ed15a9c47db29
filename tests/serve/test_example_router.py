"""The router's example: the fleet that its first lines start, and an answer through it."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import aiohttp
import yaml

from servegym.commands.serve_engine import ServeEngine
from servegym.scenario import load_scenario
from servegym.serve.engine.fleet import Fleet, FleetConfig
from servegym.serve.router.app import Router
from servegym.serve.router.config import parse_config, read_config
from servegym.serve.router.probe import probe

EXAMPLE = Path(__file__).parents[2] / "examples" / "router.yaml"


def test_it_names_the_ports_and_the_replicas_of_the_fleet():
    config = read_config(EXAMPLE)
    scenario = load_scenario(ServeEngine.scenario)
    assert f"--scenario {scenario.name} --port {ServeEngine.port}" in EXAMPLE.read_text()
    episode = scenario.episode(0, num_requests=16)
    types = [scenario.spec.types[int(i)] for i in episode.type_idx]
    assert [r.url for r in config.replicas] == [
        f"http://127.0.0.1:{ServeEngine.port + i}" for i in range(len(types))
    ]
    assert [r.facts.gpu for r in config.replicas] == [t.name.split()[0] for t in types]
    assert {r.facts.model for r in config.replicas} == {scenario.model}
    for replica, kind in zip(config.replicas, types, strict=True):
        assert replica.facts.max_num_seqs == kind.max_num_seqs
        assert replica.facts.max_num_batched_tokens == kind.max_num_batched_tokens
    assert config.dispatch.prefix.block_tokens == scenario.spec.block_size
    assert [c.name for c in config.dispatch.slo_classes] == [c.name for c in scenario.slo_classes]


def test_it_answers():
    async def test():
        fleet = Fleet(FleetConfig(load_scenario("mixed-chat"), port=0, speed=20.0))
        await fleet.start()
        text = EXAMPLE.read_text()
        for index, server in fleet.servers.items():
            text = text.replace(f"http://127.0.0.1:{8100 + index}", server.url)
        data = yaml.safe_load(text)
        data["listen"] |= {"port": 0, "admin_port": 0}
        config = parse_config(data, "example")
        assert await probe(config) == []
        router = Router(config)
        await router.start()
        body = re.search(r"-d '(.*)'", text)[1]
        url = f"http://127.0.0.1:{router.port}/v1/chat/completions"
        async with aiohttp.ClientSession() as session:
            names = set()
            for _ in range(8):
                async with session.post(url, json=json.loads(body)) as response:
                    assert response.status == 200
                    assert (await response.text()).endswith("data: [DONE]\n\n")
                    names.add(response.headers["x-servegym-replica"])
        assert names <= {replica.name for replica in config.replicas}
        assert router.dispatcher.runtime.counters.num_policy == 8
        await router.stop()
        await fleet.stop()

    asyncio.run(asyncio.wait_for(test(), 120))
