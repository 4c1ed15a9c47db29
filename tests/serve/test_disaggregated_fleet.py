"""The router before emulated engines that only prefill or only decode, beside the simulator."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError
from servegym.export.resolve import resolve_policy
from servegym.policy.run import run as play
from servegym.scenario import load_scenario, parse_scenario
from servegym.serve.decision_log import read_events, read_rows
from servegym.serve.engine.content import answer_text, request_digest
from servegym.serve.engine.fleet import Fleet, FleetConfig
from servegym.serve.router.app import Router
from servegym.serve.router.config import parse_config

from .running import PATIENT_S, VirtualTimeLoop, run, until

SCENARIO = """
name: apart
model: Llama-3.1-8B
engine: {block_size: 16, max_num_batched_tokens: 2048, max_num_seqs: 64, prefix_caching: false}
fleet:
  - {gpu: A100-SXM-80GB, count: 2, role: prefill, link: {gb_per_s: 2.0, latency_s: 0.01}}
  - {gpu: A100-SXM-80GB, count: 2, role: decode, link: {gb_per_s: 2.0, latency_s: 0.01}}
workload:
  kind: generated
  rate_rps: 8.0
  prompt: {medians_tokens: [1500.0], sigmas: [0.5], max_tokens: 4000}
  output: {medians_tokens: [30.0], sigmas: [0.5], max_tokens: 60}
"""
NUM_REQUESTS = 16
A100 = {"gpu": "A100-SXM-80GB", "model": "Llama-3.1-8B", "max_num_seqs": 64, "link_gb_per_s": 2.0}


def body(episode, i: int) -> dict:
    table = episode.table
    tokens = np.random.default_rng(i).integers(0, 50_000, int(table.prompt_tokens[i]))
    return {
        "prompt": tokens.tolist(),
        "max_tokens": int(table.output_tokens[i]),
        "ignore_eos": True,
        "stream": True,
    }


async def ask(session, url: str, body: dict, wait_s: float) -> tuple[float, float, str]:
    """Return TTFT, E2E and the text."""
    await asyncio.sleep(wait_s)
    begin_s, first_s, text = time.monotonic(), 0.0, ""
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: {"):
                first_s = first_s or time.monotonic()
                text += json.loads(line[6:])["choices"][0]["text"]
    return first_s - begin_s, time.monotonic() - begin_s, text


def test_a_fleet_with_roles_serves_as_the_simulator_says():
    scenario = parse_scenario(SCENARIO, "test")
    episode = scenario.episode(1, num_requests=NUM_REQUESTS)
    policy = "token-least-load+least-outstanding"
    simulator = Simulator(scenario.spec, [episode])
    play(simulator, resolve_policy("token-least-load"))
    outcomes = simulator.outcomes(0)
    arrival_s = outcomes["arrival_s"]
    ttft_s = float((outcomes["first_token_s"] - arrival_s).mean())
    e2e_s = float((outcomes["finish_s"] - arrival_s).mean())

    async def test():
        fleet = Fleet(FleetConfig(scenario, port=0, admin_port=0))
        await fleet.start()
        with tempfile.TemporaryDirectory() as folder:
            data = {
                "replicas": [
                    {"name": f"r{i}", "url": server.url, "role": server.role, "hardware": A100}
                    for i, server in fleet.servers.items()
                ],
                "listen": {"port": 0, "admin_port": 0},
                "dispatch": {
                    "runtime": {"policy": policy, "timeout_s": PATIENT_S},
                    "log": {"folder": folder},
                },
            }
            router = Router(parse_config(data, "test"))
            await router.start()
            url = f"http://127.0.0.1:{router.port}"
            bodies = [body(episode, i) for i in range(NUM_REQUESTS)]
            async with aiohttp.ClientSession() as session:
                answers = await asyncio.gather(
                    *(
                        ask(session, url, one, float(at_s))
                        for one, at_s in zip(bodies, arrival_s, strict=True)
                    )
                )
                await until(lambda: not any(s.state()["num_kept"] for s in fleet.servers.values()))
                async with session.get(f"http://127.0.0.1:{router.admin_port}/state") as response:
                    roles = [replica["role"] for replica in (await response.json())["replicas"]]
            assert roles == ["prefill", "prefill", "decode", "decode"]
            assert sum(router.telemetry.prefills.values()) == NUM_REQUESTS
            await router.stop()
            await fleet.stop()
            for one, (*_, text) in zip(bodies, answers, strict=True):
                digest = request_digest(one["prompt"], None)
                assert text == answer_text(digest, one["max_tokens"])
            rows = list(read_rows(Path(folder)))
            assert len(rows) == NUM_REQUESTS
            for row in rows:
                [placement] = row["placements"]
                assert row["replica_name"] == placement["replica_name"]
                assert row["replica_name"] in ("r2", "r3")
                assert row["prefill_replica_name"] in ("r0", "r1")
                assert 0.0 < row["prefilled_s"] <= placement["after_s"] < row["ttft_s"]
            assert len(read_events(Path(folder))) == 6 * NUM_REQUESTS
        live_ttft_s, live_e2e_s, _ = zip(*answers, strict=True)
        # in virtual time nobody is late but by what lies between the timers' milliseconds
        assert np.mean(live_ttft_s) == pytest.approx(ttft_s, rel=0.05)
        assert np.mean(live_e2e_s) == pytest.approx(e2e_s, rel=0.05)

    run(test, loop=VirtualTimeLoop, limit_s=60.0)


def test_replicas_with_roles_are_served_together_and_hand_over_as_vllm_does():
    scenario = load_scenario("pd-equal")
    with pytest.raises(ConfigError, match="serve all of them, without --replica"):
        Fleet(FleetConfig(scenario, replicas=[0]))
    pushed = parse_scenario(SCENARIO + "transfers: {reservation: destination}\n", "test")
    with pytest.raises(ConfigError, match="take reservation: source, got destination"):
        Fleet(FleetConfig(pushed))


async def post(session, url: str, body: dict) -> tuple[int, dict]:
    async with session.post(f"{url}/v1/completions", json=body) as response:
        return response.status, await response.json()


def test_an_engine_keeps_kv_once_for_the_same_prompt_and_until_its_lease_is_over():
    scenario = parse_scenario(SCENARIO + "transfers: {lease_s: 20.0}\n", "test")
    keep = {"prompt": "x" * 400, "kv_transfer_params": {"do_remote_decode": True}}
    whole = {"prompt": "x" * 400, "max_tokens": 3, "ignore_eos": True}

    async def test():
        fleet = Fleet(FleetConfig(scenario, port=0, admin_port=0, speed=20.0))
        await fleet.start()
        source, target = fleet.servers[0], fleet.servers[2]
        async with aiohttp.ClientSession() as session:
            status, answer = await post(session, source.url, whole)
            assert (status, answer["error"]["message"][:24]) == (400, "replica-0 only prefills:")
            status, answer = await post(session, source.url, keep)
            params = answer["kv_transfer_params"]
            assert (status, answer["usage"]["completion_tokens"]) == (200, 1)
            assert params["do_remote_prefill"] is True
            assert params["remote_engine_id"] == "replica-0"
            assert params["remote_block_ids"] == list(range(7))  # 100 tokens, 16 a block
            held = source.state()["kv_cache_usage"]
            assert (source.state()["num_kept"], held > 0.0) == (1, True)
            status, answer = await post(
                session, target.url, {**whole, "kv_transfer_params": params}
            )
            digest = request_digest(whole["prompt"], None)
            assert (status, answer["choices"][0]["text"]) == (200, answer_text(digest, 3))
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 99
            assert (source.state()["num_kept"], source.state()["kv_cache_usage"]) == (0, 0.0)
            # a second time it is not there, and nor is it once the lease, a second here, is over
            status, answer = await post(
                session, target.url, {**whole, "kv_transfer_params": params}
            )
            assert (status, "was fetched, or its lease" in answer["error"]["message"]) == (
                500,
                True,
            )
            _, answer = await post(session, source.url, keep)
            await until(lambda: not source.state()["num_kept"])
            params = answer["kv_transfer_params"]
            status, _ = await post(session, target.url, {**whole, "kv_transfer_params": params})
            assert status == 500
            # who decodes computes whole requests, too
            assert (await post(session, target.url, whole))[0] == 200
            _, answer = await post(session, source.url, keep)
            other = {
                **whole,
                "prompt": "y" * 80,
                "kv_transfer_params": answer["kv_transfer_params"],
            }
            status, answer = await post(session, target.url, other)
            assert (status, "of 100 tokens" in answer["error"]["message"]) == (400, True)
        await fleet.stop()

    run(test, loop=VirtualTimeLoop, limit_s=60.0)
