"""Users who wait and think, before a router and emulated engines on loopback; then the replay.

What is measured is of a real clock: sockets and timers of a busy machine make every turn some
milliseconds longer than the simulator has it, and these add up over the turns of a user.
"""

from __future__ import annotations

import asyncio
import json

import aiohttp
import numpy as np
import pytest

from servegym.replay.counterfactual import Arrivals, counterfactuals
from servegym.replay.fleet import router_fleet
from servegym.replay.forced import Factors
from servegym.replay.log import ReplayLog, read_log
from servegym.scenario import parse_scenario
from servegym.serve.engine.fleet import Fleet, FleetConfig
from servegym.serve.router.app import Router
from servegym.serve.router.config import RouterConfig, parse_config

FLEET = """
name: two-l40s
model: Llama-3.1-8B
engine: {block_size: 16, prefix_caching: false}
fleet:
  - {gpu: L40S, count: 2}
workload: {kind: generated, rate_rps: 1.0}
slo_classes: [{name: default, ttft_s: 10.0, tpot_s: 1.0}]
"""
TURNS = 4
#: Users that name their session, and such that are known by their prompts.
NAMED, UNNAMED = 3, 3
#: Tokens of an answer: about 0.45 s on this hardware.
TOKENS = 24
#: By how much a simulated arrival may differ from the recorded one, per turn before it.
TOLERANCE_S = 0.1


async def user(url: str, name: str, session: aiohttp.ClientSession, named: bool, wait_s: float):
    """Ask, wait for the answer, think, and ask again with all that was said."""
    await asyncio.sleep(wait_s)
    messages = [{"role": "user", "content": f"I am {name}. " + "Please go on with the story. " * 4}]
    headers = {"x-session-id": name} if named else {}
    for turn in range(TURNS):
        body = {"messages": messages, "max_tokens": TOKENS, "stream": True}
        said = []
        async with session.post(url, json=body, headers=headers) as response:
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    said += [choice["delta"].get("content") or "" for choice in choices]
                elif line.startswith(b"data: [DONE]"):
                    break
        messages += [
            {"role": "assistant", "content": "".join(said)},
            {"role": "user", "content": f"{turn}, and then?"},
        ]
        if turn + 1 < TURNS:
            await asyncio.sleep(0.1 * (turn % 2))  # every second answer is answered at once


async def serve(folder) -> RouterConfig:
    """Let the users talk to a router, and return its configuration."""
    fleet = Fleet(FleetConfig(parse_scenario(FLEET, "fleet.yaml"), port=0))
    await fleet.start()
    hardware = {"gpu": "L40S", "model": "Llama-3.1-8B"}
    data = {
        "replicas": [
            {"name": f"l40s-{i}", "url": server.url, "hardware": hardware}
            for i, server in fleet.servers.items()
        ],
        "listen": {"port": 0, "admin_port": 0},
        "dispatch": {
            "runtime": {"policy": "round-robin", "fallback": "round-robin", "timeout_s": 1.0},
            "log": {"folder": str(folder)},
        },
    }
    config = parse_config(data, "router.yaml")
    router = Router(config)
    await router.start()
    url = f"http://127.0.0.1:{router.port}/v1/chat/completions"
    async with aiohttp.ClientSession() as session:
        users = [
            user(url, f"user {i}", session, i < NAMED, 0.13 * i) for i in range(NAMED + UNNAMED)
        ]
        await asyncio.gather(*users)
    await router.stop()
    await fleet.stop()
    return config


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> ReplayLog:
    folder = tmp_path_factory.mktemp("served")
    config = asyncio.run(asyncio.wait_for(serve(folder), 120))
    return read_log([folder], router_fleet(config))


def factors(times: float) -> Factors:
    return Factors(np.zeros(0), np.full((1, 2, 3), times))


def turns_before(log: ReplayLog) -> np.ndarray:
    turns = np.zeros(len(log))
    for i, before in enumerate(log.table.after.tolist()):
        if before >= 0:
            turns[i] = turns[before] + 1
    return turns


def test_every_turn_follows_the_one_before_it(log):
    assert log.counts()["finished"] == len(log) == TURNS * (NAMED + UNNAMED)
    later = TURNS - 1
    assert log.links.num_by == {"session": later * NAMED, "prefix": later * UNNAMED}
    assert log.links.num_cut == 0
    turns = turns_before(log)
    assert sorted(turns.tolist()) == sorted([*range(TURNS)] * (NAMED + UNNAMED))
    thought = log.table.delay_s[turns > 0]
    assert (np.minimum(thought, abs(thought - 0.1)) < TOLERANCE_S).all()


def test_the_closed_replay_reproduces_the_arrivals(log):
    # the decisions as logged: whom a turn meets where depends on milliseconds otherwise
    logged, same = counterfactuals(log, ["round-robin"], factors(1.0))
    turns = turns_before(log)
    assert logged.shift_s[turns == 0] == pytest.approx(0.0, abs=1e-9)
    assert (abs(logged.shift_s) <= TOLERANCE_S * turns + 1e-9).all()
    assert (abs(same.shift_s) <= TOLERANCE_S * turns + 1e-9).all()


def test_slower_engines_put_arrivals_off_in_a_closed_loop_alone(log):
    _, closed = counterfactuals(log, ["round-robin"], factors(2.0))
    _, opened = counterfactuals(log, ["round-robin"], factors(2.0), Arrivals.of(log, "open"))
    turns = turns_before(log)
    e2e_s = float(np.median(log.e2e_s))
    for turn in range(1, TURNS):
        # twice as slow: each turn before has taken its time once more
        shift_s = closed.shift_s[turns == turn]
        assert shift_s == pytest.approx(turn * e2e_s, abs=TOLERANCE_S * turn + 0.25 * turn * e2e_s)
    np.testing.assert_array_equal(opened.shift_s, 0.0)
