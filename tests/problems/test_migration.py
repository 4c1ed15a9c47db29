"""Migration does what Llumnix says where memory is short: hardly anybody is preempted."""

from __future__ import annotations

from typing import Any

import numpy as np

from servegym.problems.dispatch import Dispatch
from servegym.scenario import load_scenario


def played(policy: str) -> list[dict[str, float]]:
    problem: Dispatch = Dispatch()
    episodes = problem.episodes(load_scenario("near-full-kv"), [0, 1, 2, 3])
    made: Any = problem.resolve(policy)
    return episodes.play(made).metrics


def test_preemptions_nearly_vanish_and_pauses_are_short():
    stay, move = played("added-delay+stay"), played("added-delay+freeness")
    preempted = sum(m["preemptions"] for m in stay)
    assert preempted > 100
    assert sum(m["preemptions"] for m in move) < 0.2 * preempted
    assert np.mean([m["ttft_p99_s"] for m in move]) < 0.5 * np.mean([m["ttft_p99_s"] for m in stay])
    assert len(move) == 4
    for m in move:
        assert m["migrations"] > 50
        assert m["moved_gb"] > 1
        assert 0.005 < m["pause_mean_s"] < 0.06  # 16 blocks of 8 MB at 4 GB/s take 32 ms
    assert sum(m["migrations"] + m["moved_gb"] for m in stay) == 0
