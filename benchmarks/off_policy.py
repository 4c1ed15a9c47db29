"""How well estimates from logs of one policy say what another would bring, at light and high load.

`python benchmarks/off_policy.py`: many logs of a simulated fleet of three replicas under half
explored `least-outstanding`; each estimates the mean E2E latency of `added-delay`, whose true one
comes from its own play. `tests/replay/test_off_policy.py` holds the first row to its word.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import yaml

from servegym.baselines.registry import policy
from servegym.replay.dataset import OfflineDataset
from servegym.replay.off_policy import estimate
from servegym.train.recording import EpisodeRecorder

SCENARIO = {
    "name": "small",
    "engine": {"block_size": 16, "max_num_seqs": 16},
    "fleet": [{"gpu": "H100-SXM-80GB"}, {"gpu": "L40S", "count": 2}],
    "workload": {
        "kind": "generated",
        "rate_rps": 30.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 1000},
        "output": {"medians_tokens": [30.0], "max_tokens": 100},
    },
}


class Logs:
    """Draws logs of a policy.

    Args:
        folder: Where the scenario's file may be written.
        load: Load factor.
        num_requests: Of each log.
    """

    def __init__(self, folder: Path, load: float, num_requests: int) -> None:
        file = folder / "small.yaml"
        file.write_text(yaml.safe_dump(SCENARIO))
        self._recorder = EpisodeRecorder(str(file), num_requests=num_requests, load=load)

    def draw(self, name: str, seed: int, explored: float = 0.0) -> OfflineDataset:
        """Play an episode and keep it as a log would."""
        played = self._recorder.play(policy(name), seed, explored)
        done = np.sort(self._recorder.env.unwrapped.batch.simulator.outcomes(), order="arrival_s")
        seen, count = played.observations, len(played.actions)
        mask = np.zeros((count, seen["action_mask"].shape[1] + 2), np.bool_)
        mask[:, :-2] = seen["action_mask"][:-1]
        return OfflineDataset(
            replicas=seen["replicas"][:-1].transpose(0, 2, 1),
            request=seen["request"][:-1],
            mask=mask,
            action=played.actions,
            proposed=played.actions,
            propensity=played.infos["propensity"][:-1],
            by_policy=np.ones(count, np.bool_),
            request_id=np.arange(count),
            is_last=np.ones(count, np.bool_),
            time_s=done["arrival_s"],
            status=np.zeros(count, np.int64),
            ttft_s=done["first_token_s"] - done["arrival_s"],
            tpot_s=np.full(count, np.nan),
            e2e_s=done["finish_s"] - done["arrival_s"],
            output_tokens=np.ones(count, np.int64),
            num_skipped=0,
        )


def main() -> None:
    """Draw logs, estimate and print a row a load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.02, 0.8])
    parser.add_argument("--logs", type=int, default=60)
    parser.add_argument("--explored", type=float, default=0.5)
    parser.add_argument("--num-requests", type=int, default=400)
    given = parser.parse_args()
    print("load   true      sampled   covered   doubly robust   covered")
    for load in given.loads:
        with tempfile.TemporaryDirectory() as folder:
            logs = Logs(Path(folder), load, given.num_requests)
            truth_s = np.mean(
                [logs.draw("added-delay", 10_000 + k).e2e_s.mean() for k in range(60)]
            )
            found = [
                estimate(logs.draw("least-outstanding", k, given.explored), policy("added-delay"))
                for k in range(given.logs)
            ]
        row = f"{load:<6g} {truth_s:.4f} s"
        for kind in ("sampled", "robust"):
            each = [getattr(x, kind) for x in found]
            covered = np.mean([x.low <= truth_s <= x.high for x in each])
            row += f"   {np.mean([x.value for x in each]):.4f} s  {covered:.0%}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
