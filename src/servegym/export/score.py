"""Files of closed-form scores: `score.json`, with a manifest beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from servegym.baselines.score import Score, score_policy
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import DONE
from servegym.errors import ConfigError, ExportError
from servegym.export.manifest import Manifest, policy_name, write_policy
from servegym.policy.contract import INFERRED, UP, observed, observed_groups
from servegym.policy.observe import observe_batch

SUFFIX = ".json"
_KEY = "score"
#: How often a choice is drawn where the ranges of features are sampled.
_DRAWN = 0.1


def sample_rows(
    score: Score, spec: ClusterSpec, episodes: Sequence[Episode], seed: int = 0
) -> dict[str, np.ndarray]:
    """Return what a score sees where it goes, one choice in ten drawn at random.

    Args:
        score: Who decides.
        spec: The rules.
        episodes: Of training.
        seed: Of what is drawn.

    Returns:
        Rows of features, `replicas float64[n, F]` of those that are up and `request float64[m, G]`,
        of the extended observation where the score reads what is inferred.
    """
    rng = np.random.default_rng(seed)
    simulator = Simulator(spec, episodes)
    extended = bool(score.needs & INFERRED)
    shape, needs = observed(extended=extended), observed_groups(extended=extended)
    replicas, requests = [], []
    score.reset(simulator.num_envs, seed)
    while (simulator.advance() != DONE).any():
        seen, envs = observe_batch(simulator, needs)
        columns = seen.replicas[:, : shape.replicas].transpose(0, 2, 1)
        replicas.append(columns[columns[:, :, UP] > 0.0])
        requests.append(seen.request[:, : shape.request])
        chosen = score.act(seen, envs)
        drawn = (rng.random(seen.mask.shape) * seen.mask).argmax(-1)
        answers = np.zeros(simulator.num_envs, np.int64)
        answers[envs] = np.where(rng.random(len(envs)) < _DRAWN, drawn, chosen)
        simulator.apply(answers)
    return {"replicas": np.concatenate(replicas), "request": np.concatenate(requests)}


def save_score(
    score: Score,
    folder: Path,
    samples: Mapping[str, np.ndarray],
    *,
    scenario: str = "",
    objective: str = "",
    training: dict[str, float | int | str] | None = None,
) -> Path:
    """Write `score.json` and `manifest.json`.

    Args:
        score: What to export.
        folder: Where to.
        samples: Rows of features from training, `replicas float[n, F]` and `request float[m, G]`,
            to state their ranges: of the extended observation where the score reads what is
            inferred.
        scenario: What it was found on.
        objective: Of that.
        training: Summary for the manifest.

    Returns:
        Path of the file.

    Raises:
        OutputError: If the files cannot be written; those that were there are untouched.
    """
    text = json.dumps({_KEY: str(score.expression)}, indent=2) + "\n"
    return write_policy(
        folder / f"score{SUFFIX}",
        "dispatch",
        text.encode(),
        samples,
        extended=bool(score.needs & INFERRED),
        information=score.information,
        scenario=scenario,
        objective=objective,
        training=training or {},
    )


def exported_score(path: Path, manifest: Manifest) -> Score:
    """Return the policy of a verified manifest.

    Raises:
        ExportError: If the file holds no score, or one that reads more than its manifest says.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read as a score: {error}") from error
    if (
        not isinstance(content, dict)
        or set(content) != {_KEY}
        or not isinstance(content[_KEY], str)
    ):
        raise ExportError(f'{path} must be {{"{_KEY}": "..."}}: export it again')
    try:
        score = score_policy(content[_KEY], policy_name(path))
    except ConfigError as error:
        raise ExportError(f"{path}: {error}") from error
    if score.needs & INFERRED and not manifest.extended:
        raise ExportError(
            f"{path} reads what is inferred, and its manifest is of the plain observation: export"
            " it again"
        )
    return score
