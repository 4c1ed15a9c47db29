from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import yaml

from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    ReplicaFeature,
    RequestFeature,
)

Arrays = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread_and_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def draw_observations() -> Callable[..., Arrays]:
    """Return a drawer of observations of plausible size: replicas, request, mask."""

    def draw(batch: int, num_replicas: int, *, num_extra: int = 0, seed: int = 0) -> Arrays:
        rng = np.random.default_rng(seed)
        replicas = rng.uniform(0, 20, (batch, num_replicas, NUM_OBSERVED_FEATURES))
        column = {f.name: replicas[..., f] for f in ReplicaFeature if f < NUM_OBSERVED_FEATURES}
        column["UP"][:] = 1.0
        column["RELATIVE_SPEED"][:] = rng.uniform(0.1, 1.0, (batch, num_replicas))
        column["PREFILL_TOKENS_PER_S"][:] = rng.uniform(2e3, 5e4, (batch, num_replicas))
        column["DECODE_STEP_S"][:] = rng.uniform(0.005, 0.03, (batch, num_replicas))
        column["DECODE_SEQ_S"][:] = rng.uniform(1e-5, 1e-3, (batch, num_replicas))
        column["KV_CAPACITY_TOKENS"][:] = rng.uniform(1e4, 5e5, (batch, num_replicas))
        column["MAX_NUM_SEQS"][:] = 128.0
        column["PENDING_PREFILL_TOKENS"][:] = rng.uniform(0, 5e3, (batch, num_replicas))
        request = rng.uniform(0, 1, (batch, NUM_OBSERVED_REQUEST_FEATURES))
        request[:, RequestFeature.PROMPT_TOKENS] = rng.integers(1, 4000, batch)
        request[:, RequestFeature.PREDICTED_OUTPUT_TOKENS] = rng.integers(1, 1000, batch)
        mask = rng.random((batch, num_replicas + num_extra)) < 0.7
        mask[np.arange(batch), rng.integers(0, num_replicas, batch)] = True
        return tuple(torch.tensor(x, dtype=torch.float32) for x in (replicas, request, mask))

    return draw


@pytest.fixture(scope="session")
def write_scenario(tmp_path_factory) -> Callable[..., str]:
    """Return a writer of a small scenario's YAML file; trainers take names and paths."""

    def write(**changes: object) -> str:
        data = {
            "name": "small",
            "engine": {"block_size": 16, "max_num_seqs": 16},
            "fleet": [{"gpu": "H100-SXM-80GB"}, {"gpu": "L40S", "count": 2}],
            "workload": {
                "kind": "generated",
                "rate_rps": 30.0,
                "prompt": {"medians_tokens": [200.0], "max_tokens": 1000},
                "output": {"medians_tokens": [30.0], "max_tokens": 100},
            },
            "num_requests": 40,
        }
        path = tmp_path_factory.mktemp("scenario") / "small.yaml"
        path.write_text(yaml.safe_dump(data | changes))
        return str(path)

    return write
