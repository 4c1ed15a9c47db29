"""Learn an order from requests that ended: how many tokens does each really have left?

    python learn.py FOLDER

A small perceptron is fitted, with NumPy alone, to the logarithm of the output tokens that are left,
from what the engine can tell at that moment; both heads are the same. Fewest left is admitted
first, most left is preempted first, as in learning to rank (Fu et al. 2024).
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from workload import Drawn, draw

from servegym.export.ordering import save_ordering
from servegym.policy.learned_ordering import OrderingWeights, normalise
from servegym.policy.ordering import NO_LIMIT_S, NUM_ORDERING_FEATURES, ORDERING_FEATURES

WIDTHS = (NUM_ORDERING_FEATURES, 64, 64)
EPOCHS = 60
BATCH = 256
RATE = 3e-3


def row(drawn: Drawn, generated: int, rng: np.random.Generator) -> list[float]:
    """Features of a request that has generated some tokens, in an engine in any state."""
    running = float(generated > 0 or rng.random() < 0.2)
    values = {
        "is_running": running,
        "client_priority": drawn.priority,
        "prompt_tokens": len(drawn.prompt),
        "computed_tokens": running * (len(drawn.prompt) + generated),
        "generated_tokens": generated,
        "predicted_remaining_tokens": max(drawn.predicted_tokens - generated, 1),
        "waited_s": rng.exponential(2.0),
        "idle_s": (1 - running) * rng.exponential(2.0),
        "kv_blocks": running * np.ceil((len(drawn.prompt) + generated) / 32),
        "num_preemptions": rng.integers(0, 3) * running,
        "ttft_slack_s": NO_LIMIT_S if generated else drawn.ttft_slo_s - rng.exponential(1.0),
        "deadline_slack_s": NO_LIMIT_S,
        "num_running": rng.integers(1, 33),
        "num_waiting": rng.integers(0, 150),
        "kv_cache_usage": rng.random(),
        "step_s": rng.uniform(0.002, 0.05),
        "max_num_batched_tokens": 256,
    }
    return [float(values[f.name]) for f in ORDERING_FEATURES]


def samples(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows and the logarithms of the tokens that are really left."""
    rng = np.random.default_rng(seed)
    rows, left = [], []
    for drawn in draw(4000, 1.0, 1024, seed):
        for generated in (0, int(rng.integers(0, drawn.output_tokens))):
            rows.append(row(drawn, generated, rng))
            left.append(drawn.output_tokens - generated)
    return np.array(rows), np.log(np.array(left, float))


def fit(features: np.ndarray, target: np.ndarray) -> OrderingWeights:
    """Fit by Adam on the squared error."""
    rng = np.random.default_rng(0)
    blank = OrderingWeights(np.zeros(WIDTHS[0], np.float32), np.ones(WIDTHS[0], np.float32), (), ())
    raw = np.copysign(np.log1p(np.abs(features)), features)
    mean, scale = raw.mean(0), np.maximum(raw.std(0), 1e-3)
    inputs = normalise(
        features, blank._replace(mean=mean.astype(np.float32), scale=scale.astype(np.float32))
    ).astype(float)
    sizes = [*pairwise(WIDTHS), (WIDTHS[-1], 1)]
    params = [rng.normal(0, np.sqrt(2 / a), (a, b)) for a, b in sizes]
    params += [np.zeros(b) for _, b in sizes]
    first, second = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    step = 0
    for epoch in range(EPOCHS):
        for part in np.array_split(rng.permutation(len(inputs)), len(inputs) // BATCH):
            step += 1
            grads = gradients(params, inputs[part], target[part])
            rate = RATE * (1 - epoch / EPOCHS)
            for p, g, m, v in zip(params, grads, first, second, strict=True):
                m += 0.1 * (g - m)
                v += 0.001 * (g * g - v)
                p -= rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    weights, biases = params[: len(sizes)], params[len(sizes) :]
    # both heads are the one that was fitted
    weights[-1], biases[-1] = np.repeat(weights[-1], 2, 1), np.repeat(biases[-1], 2)
    return OrderingWeights(
        mean.astype(np.float32),
        scale.astype(np.float32),
        tuple(w.astype(np.float32) for w in weights),
        tuple(b.astype(np.float32) for b in biases),
    )


def gradients(params: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Gradients of the mean squared error."""
    depth = len(params) // 2
    weights, biases = params[:depth], params[depth:]
    layers = [x]
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        layers.append(np.maximum(layers[-1] @ w + b, 0))
    error = (layers[-1] @ weights[-1] + biases[-1])[:, 0] - y
    delta = (2 * error / len(x))[:, None]
    dw, db = [], []
    for i in reversed(range(depth)):
        dw.insert(0, layers[i].T @ delta)
        db.insert(0, delta.sum(0))
        if i:
            delta = (delta @ weights[i].T) * (layers[i] > 0)
    return [*dw, *db]


def concordance(score: np.ndarray, target: np.ndarray) -> float:
    """Kendall's tau over random pairs."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, len(score), (2, 200_000))
    sign = np.sign(score[a] - score[b]) * np.sign(target[a] - target[b])
    return float(sign.mean())


def main() -> None:
    """Fit, say how well it ranks requests it has not seen, and write it."""
    features, target = samples(seed=1)
    weights = fit(features, target)
    path = save_ordering(weights, Path(sys.argv[1]), features, training={"rows": len(target)})
    from servegym.export.ordering import load_ordering

    unseen, left = samples(seed=2)
    tau = concordance(load_ordering(path).score(unseen, np.zeros((len(unseen), 0))), left)
    column = [f.name for f in ORDERING_FEATURES].index("predicted_remaining_tokens")
    told = concordance(unseen[:, column], left)
    print(
        f"learned order: Kendall tau {tau:.2f} on unseen requests, clients' predictions {told:.2f}"
    )


if __name__ == "__main__":
    main()
