from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from servegym.baselines.registry import policy
from servegym.evaluate.harness import Evaluation, evaluate
from servegym.scenario import Scenario

SMALL = {
    "name": "small & <mixed>",
    "engine": {"block_size": 16, "max_num_seqs": 16},
    "fleet": [{"gpu": "H100-SXM-80GB"}, {"gpu": "L40S", "count": 2}],
    "workload": {
        "kind": "generated",
        "rate_rps": 30.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 1000},
        "output": {"medians_tokens": [30.0], "max_tokens": 100},
    },
    "slo_classes": [
        {"name": "fast", "ttft_s": 0.05, "tpot_s": 0.02},
        {"name": "slow", "ttft_s": 1.0, "tpot_s": 0.1},
    ],
    "num_requests": 100,
}


@pytest.fixture(scope="session")
def make_scenario() -> Callable[..., Scenario]:
    def make(**changes: Any) -> Scenario:
        return Scenario.model_validate({**SMALL, **changes})

    return make


@pytest.fixture(scope="session")
def compared(make_scenario) -> Evaluation:
    """Three rules, one of them an oracle, at two loads on three seeds."""
    policies = [policy(name) for name in ("round-robin", "speed-family", "mct-oracle")]
    return evaluate(make_scenario(), policies, loads=[0.5, 1.5], num_seeds=3)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Pages whose words are looked at: their figures are laid out, but no pixels are made."""
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *to, **settings: None)
