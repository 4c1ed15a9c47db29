"""Metrics of one episode of jobs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servegym.typing import FloatArray
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode, FleetSpec


def alone_s(spec: FleetSpec, episodes: Sequence[Episode]) -> list[FloatArray]:
    """Time of each job on the fastest devices, with no data to move and nobody else there.

    Args:
        spec: The fleet.
        episodes: What is played.

    Returns:
        Seconds, `float64[num_jobs]` an episode: the longest way through the true job.
    """
    simulator = Simulator(spec, episodes)
    simulator.tell_truth()
    found = []
    for env, episode in enumerate(episodes):
        rows = simulator.state.job[env, : episode.num_jobs]
        tail_s = simulator.state.stage["tail_s"][env]
        ends = rows["first_stage"] + rows["num_stages"]
        ways = zip(rows["first_stage"].tolist(), ends.tolist(), strict=True)
        found.append(np.array([tail_s[first:stop].max() for first, stop in ways]))
    return found


def measure_jobs(simulator: Simulator, env: int, alone_s: FloatArray) -> dict[str, float]:
    """Reduce a drained episode to numbers.

    Args:
        simulator: That played it.
        env: Its environment.
        alone_s: Time of each job alone, see `alone_s`.

    Returns:
        Metrics by name; see docs/workflow-online.md.
    """
    jobs, stages, devices = simulator.jobs(env), simulator.stages(env), simulator.devices(env)
    jct_s = jobs["finish_s"] - jobs["arrival_s"]
    late_s = np.maximum(0.0, jct_s - jobs["deadline_s"])
    span_s = float(jobs["finish_s"].max() - jobs["arrival_s"].min())
    prompts = float(stages["prompt_tokens"].sum())
    on_device = stages["device"] >= 0
    waits_s = (stages["start_s"] - stages["ready_s"])[on_device]
    out = {
        "jct_mean_s": float(jct_s.mean()),
        **{f"jct_p{q}_s": float(np.percentile(jct_s, q)) for q in (50, 90, 95, 99)},
        "weighted_jct_mean_s": float(np.average(jct_s, weights=jobs["weight"])),
        "slowdown_mean": float((jct_s / np.maximum(alone_s, 1e-12)).mean()),
        "makespan_s": span_s,
        "throughput_jobs_per_s": len(jobs) / span_s if span_s > 0 else float("nan"),
        "deadline_attainment": float(
            np.average(jct_s <= jobs["deadline_s"], weights=jobs["weight"])
        ),
        "tardiness_mean_s": float(late_s.mean()),
        "utilisation": float(devices["busy_s"].mean() / span_s) if span_s > 0 else float("nan"),
        "wait_mean_s": float(waits_s.mean()) if len(waits_s) else 0.0,
        "in_system_mean": float(jct_s.sum() / span_s) if span_s > 0 else float("nan"),
        "prefix_hit_rate": float(stages["cached_tokens"].sum()) / prompts
        if prompts
        else float("nan"),
        "restarts": float(stages["num_restarts"].sum()),
        "decisions": float(simulator.state.env[env]["num_decisions"]),
    }
    for t, kind in enumerate(simulator.spec.types):
        mine = devices["type_idx"] == t
        if mine.any() and span_s > 0:
            out[f"utilisation_{kind.name}"] = float(devices["busy_s"][mine].mean() / span_s)
    return out
