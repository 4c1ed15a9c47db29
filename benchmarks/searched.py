"""Held-out episodes under what cross-entropy searches have found, in compiled code.

    python benchmarks/searched.py runs/held-1 assets/policies/held --rules added-delay-held:wait=0.7

A policy that holds decides tens of thousands of times in an episode, and its exported network takes
a tenth of a millisecond for each. What is searched decides alike in a microsecond or so (a test
holds them equal). What is named is the folder of a run, or that of a network that such a run has
exported from a base that holds. Ratios of mean E2E to the first rule, on the seeds that `servegym
evaluate` plays, warm-up left out, with 95 % intervals.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from servegym.baselines.registry import policy
from servegym.evaluate.harness import evaluate
from servegym.export.manifest import read_manifest
from servegym.policy.numpy_network import NetworkShape
from servegym.policy.perceptron_rule import perceptron_rule
from servegym.policy.play_perceptron import Perceptrons
from servegym.policy.policy import Heuristic
from servegym.scenario import Scenario, load_scenario
from servegym.train.cross_entropy import CrossEntropyTrainer


def exported(folder: Path) -> tuple[Scenario, Heuristic]:
    """Return where an exported network was searched, and the network as a compiled rule.

    Behind its first layer such a network passes on what is there, so that its units are the rule's.
    """
    manifest, file = read_manifest(folder / "policy.onnx"), folder / "weights.npz"
    shape = manifest.network
    if not isinstance(shape, NetworkShape) or shape.base != "added-delay-held":
        raise SystemExit(f"{folder} must be a network from base added-delay-held, got another")
    weights = {name: array.astype(float) for name, array in np.load(file).items()}
    first = weights["actor.own.0.weight"]
    nets = Perceptrons(
        mean=np.zeros(first.shape[1]),
        scale=np.ones(first.shape[1]),
        hidden=first.T[None].copy(),
        hidden_bias=weights["actor.own.0.bias"][None],
        out=np.stack([weights["score.weight"][0], weights["hold.weight"][0]], -1)[None],
    )
    numbers = np.array([shape.eta, *shape.base_params])
    return load_scenario(manifest.scenario), perceptron_rule(
        "added-delay-held", numbers, nets, folder.name
    )


def searched(folder: Path) -> tuple[Scenario, Heuristic]:
    """Return where a run has searched, and what it has found."""
    trainer = CrossEntropyTrainer.stored(folder)
    return trainer.scenario, replace(trainer.compiled(), name=str(folder))


def main() -> None:
    """Play, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders")
    parser.add_argument("--rules", nargs="+", required=True, help="what they are compared with")
    parser.add_argument("--scenario", help="where they play, if not where the first was searched")
    parser.add_argument("--loads", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--num-requests", type=int, default=1000)
    given = parser.parse_args()
    found = [
        exported(folder) if (folder / "manifest.json").exists() else searched(folder)
        for folder in given.runs
    ]
    result = evaluate(
        load_scenario(given.scenario) if given.scenario else found[0][0],
        [*map(policy, given.rules), *(rule for _, rule in found)],
        loads=given.loads,
        num_seeds=given.seeds,
        num_units=given.num_requests,
    )
    print("| load | policy | mean E2E s | p99 TTFT s | within limits | ratio |")
    print("|---|---|--:|--:|--:|---|")
    for load in given.loads:
        for name, _ in result.policies:
            ratio = result.ratio(name, given.rules[0], load)
            e2e_s, ttft_s, within = (
                result.values(name, load, metric).mean()
                for metric in ("e2e_mean_s", "ttft_p99_s", "slo_attainment")
            )
            shown = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            print(f"| {load:g} | `{name}` | {e2e_s:.3f} | {ttft_s:.2f} | {within:.1%} | {shown} |")


if __name__ == "__main__":
    main()
