"""`servegym score`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track
from tyro.conf import Positional

from servegym.commands.console import make_console, require_writable
from servegym.documents import without_nan
from servegym.errors import ConfigError
from servegym.evaluate.tune import NUM_SEEDS, resolve
from servegym.problems.registry import load_problem
from servegym.scenario import Scenario
from servegym.whole_files import write_whole


@dataclass(frozen=True)
class Score:
    """Judge closed-form scores that somebody proposes, on training seeds.

    A file of JSON lines goes in, each a candidate, `{"score": "outstanding_requests /
    relative_speed"}`, and a line for each comes out: its objective, how it compares with a
    reference, or what is wrong with it, in a sentence. What scores are: docs/policies.md.
    """

    candidates: Positional[Path]
    """File of candidates; `"id"` of a line is passed on."""
    scenario: str = "mixed-chat"
    """Bundled scenario name or YAML file, of dispatch."""
    reference: str = "added-delay"
    """Rule that candidates are compared with; `NAME:tuned` is tuned first."""
    loads: tuple[float, ...] = (0.8, 1.0)
    """Loads over which the scenario's objective is averaged."""
    seeds: int = NUM_SEEDS
    """Training episodes per load; never the held-out ones of `evaluate`."""
    num_requests: int | None = None
    """Requests per episode, instead of the scenario's own number."""
    out: Path | None = None
    """File for the results, instead of standard output."""
    export: Path | None = None
    """Folder for the best of them as a policy: `score.json` and its manifest."""

    def run(self) -> None:
        """Judge, and write the results."""
        # compiled when it is imported: not for those who judge no scores
        from servegym.evaluate.candidates import judge_candidates, read_candidates

        require_writable(self.out, self.export and self.export / "score.json")
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {self.seeds}")
        if not self.loads:
            raise ConfigError("there must be at least one load, got none")
        problem, scenario = load_problem(self.scenario)
        if problem.name != "dispatch":
            raise ConfigError(
                f"scores are of dispatchers, and {self.scenario} is a scenario of problem"
                f" {problem.name}: choose another"
            )
        proposed = read_candidates(self.candidates)
        reference = resolve(problem, scenario, self.reference, self.loads, self.num_requests)
        lines = judge_candidates(
            problem,
            scenario,
            proposed,
            reference,
            loads=self.loads,
            num_seeds=self.seeds,
            num_units=self.num_requests,
            track=lambda given: track(given, "judging", transient=True, disable=self.out is None),
        )
        text = "".join(json.dumps(without_nan(line), ensure_ascii=False) + "\n" for line in lines)
        if self.export is not None:
            self._export(scenario, lines)
        if self.out is None:
            print(text, end="")
            return
        write_whole({self.out: text.encode()})
        wrong = sum("error" in line for line in lines)
        make_console().print(
            f"{len(lines) - wrong} judged, {wrong} refused: {self.out}", soft_wrap=True
        )

    def _export(self, scenario: Scenario, lines: Sequence[dict[str, Any]]) -> None:
        """Write the best candidate as a policy."""
        from servegym.baselines.score import score_policy
        from servegym.export.score import sample_rows, save_score

        good = [line for line in lines if "error" not in line]
        if not good:
            raise ConfigError(
                f"{self.candidates} has no score that could be exported: see its errors"
            )
        assert self.export is not None
        more = scenario.objective == "goodput"
        best = (max if more else min)(good, key=lambda line: line["objective"])
        score = score_policy(best["score"])
        episodes = [
            scenario.episode(seed, load=load, num_requests=self.num_requests)
            for load in self.loads
            for seed in range(self.seeds)
        ]
        save_score(
            score,
            self.export,
            sample_rows(score, scenario.spec, episodes),
            scenario=self.scenario,
            objective=scenario.objective,
            training={"algorithm": "proposed", "candidates": len(good)},
        )
