"""Plays the simulator as if it were a live fleet behind the real dispatcher, which writes its log.

The fleet may differ from what its cost model says: other grids per replica, from some time on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from servegym.cluster import state as s
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ReplicaType
from servegym.replay.terms import scaled
from servegym.scenario import Scenario, parse_scenario
from servegym.serve.decision_log import DecisionLogConfig
from servegym.serve.dispatcher import DispatchConfig, Dispatcher, SloConfig
from servegym.serve.facts import Hardware, fleet_facts
from servegym.serve.requests.prompt import Prompt
from servegym.serve.runtime import RuntimeConfig
from servegym.serve.state import EngineMetrics

SCENARIO = """
name: live-fleet
model: Llama-3.1-8B
fleet:
  - {gpu: A100-SXM-80GB, count: 2}
  - {gpu: L40S}
workload:
  kind: generated
  rate_rps: 12.0
  prompt: {medians_tokens: [400], sigmas: [0.8], weights: [1], max_tokens: 4000}
  output: {medians_tokens: [120], sigmas: [0.7], weights: [1], max_tokens: 1000}
slo_classes:
  - {name: chat, ttft_s: 1.0, tpot_s: 0.05, share: 0.7}
  - {name: batch, ttft_s: 10.0, tpot_s: 0.2, share: 0.3}
"""
#: The same fleet for users who wait for their answers and think; caches are off, as the log's
#: hashes are too coarse to reproduce them.
SESSIONS = SCENARIO.replace(
    "  prompt:", "  sessions: {mean_turns: 5, think_s: 2, wait_for_answers: true}\n  prompt:"
).replace("fleet:", "engine: {prefix_caching: false}\nfleet:")
NAMES = ("a100-0", "a100-1", "l40s-0")
Distort = Callable[[ReplicaType], ReplicaType]


def scenario(text: str = SCENARIO) -> Scenario:
    return parse_scenario(text, "live.yaml")


def slower(step: float = 1.0, kv: float = 1.0, prefill: float = 1.0) -> Distort:
    """A replica whose terms cost so many times what the model says."""
    return lambda made: replace(made, grid=scaled(made.grid, step, kv, prefill))


def play_live(
    folder: Path,
    played: Scenario,
    *,
    num_requests: int = 1500,
    seed: int = 5,
    distorted: dict[int, Distort] | None = None,
    from_s: float = 0.0,
    noise: float = 0.0,
    request_s: float = 0.0,
    policy: str = "least-outstanding",
    names: tuple[str, ...] = NAMES,
    end: Callable[[int], str | None] = lambda i: None,
    **log: object,
) -> list[Path]:
    """Serve the scenario's requests by a fleet that differs from it, and return the log's files.

    Args:
        folder: For the log.
        played: Fleet and workload.
        num_requests: Of the episode.
        seed: Of the episode.
        distorted: What is different about replicas.
        from_s: Since when.
        noise: Standard deviation of the logarithm of step times.
        request_s: That the client sees later than the engine sends.
        policy: Decides.
        names: Of the replicas.
        end: Status of a request that the client cancels at its first token, by number.
        **log: Settings of the log.
    """
    spec = replace(played.spec, noise_sigma=noise)
    episode = played.episode(seed, num_requests=num_requests)
    kinds = [spec.types[t] for t in episode.type_idx]
    later = dict(enumerate(kinds)) | {r: f(kinds[r]) for r, f in (distorted or {}).items()}
    num = len(kinds)
    spec = replace(spec, types=(*kinds, *(later[r] for r in range(num))))
    simulator = Simulator(
        spec, [replace(episode, type_idx=np.arange(num, dtype=np.int16))], record=True
    )
    facts = [
        Hardware(gpu=e.gpu, model=played.model, tp=e.tp)
        for e in played.fleet
        for _ in range(e.count)
    ]
    now = [0.0]
    dispatcher = Dispatcher(
        DispatchConfig(
            runtime=RuntimeConfig(policy=policy, timeout_s=1.0),
            slo_classes=tuple(
                SloConfig(name=c.name, ttft_s=c.ttft_s, tpot_s=c.tpot_s) for c in played.slo_classes
            ),
            log=DecisionLogConfig(folder=folder, **log),
            seed=seed,
        ),
        names,
        fleet_facts(facts),
        clock=lambda: now[0],
    )
    table, jobs, done = episode.table, {}, 0

    def tell(until_s: float) -> None:
        """Tell the dispatcher what has happened."""
        nonlocal done
        log = simulator.state.log[0, : int(simulator.state.env[0]["log_len"])]
        while done < len(log) and log[done]["time_s"] + request_s <= until_s:
            event, done = log[done], done + 1
            i, kind = int(event["request"]), int(event["kind"])
            now[0] = float(event["time_s"]) + request_s
            if kind == s.EV_FIRST_TOKEN and not jobs[i].ended:
                dispatcher.first_token(jobs[i])
                if (status := end(i)) is not None:
                    dispatcher.end(jobs[i], status)
            elif kind == s.EV_FINISH and not jobs[i].ended:
                dispatcher.finish(jobs[i], int(table.output_tokens[i]))

    while simulator.advance()[0] == s.DECISION:
        env = simulator.state.env[0]
        i, at_s = int(env["deciding"]), float(env["now_s"])
        tell(at_s)
        now[0] = at_s
        if at_s >= from_s:
            simulator.state.replica[0]["type_idx"] = num + np.arange(num)
        for r, there in enumerate(simulator.state.replica[0]):
            told = EngineMetrics(float(there["num_running"]), float(there["num_waiting"]), 0.1)
            dispatcher.update_metrics(r, told, at_s)
        prompt = Prompt(int(table.prompt_tokens[i]), np.zeros(0, np.uint64), 16)
        session = int(table.session[i])
        jobs[i] = dispatcher.arrive(
            prompt,
            key=str(i),
            slo_class=int(table.slo_class[i]),
            session=None if session < 0 else str(session),
        )
        jobs[i].wall_s = 1.7e9 + at_s  # the wall clock goes with the simulated one
        simulator.apply(np.array([dispatcher.decide(jobs[i]).action]))
    tell(float("inf"))
    dispatcher.close()
    return sorted(folder.iterdir())
