"""Training a fleet as a whole: who goes where, and who is admitted and preempted there.

The dispatcher and the schedulers, which share their weights, are searched in turns, each against
what the other is at present. Whole episodes judge, so that what shows minutes later counts as well:
a dispatcher may come to rely on how the engines order what it sends them, and they on it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from servegym.policy.ordering import PREDICTED_REMAINING_TOKENS, PROMPT_TOKENS
from servegym.train.joint_settings import JointTraining
from servegym.train.pair_run import PairRun, TrainedPair
from servegym.train.request_run import losses
from servegym.train.run_folder import StoredRun
from servegym.train.search import Search
from servegym.train.search_run import SearchRun
from servegym.train.validation import Validated
from servegym.typing import FloatArray

#: Standard deviations of weights at first: around what is near to rules; around what is good.
_WIDE, _NARROW = 0.3, 0.1
#: Exponents of the prompt with which it may begin, of waiting requests and of running ones.
_POWERS = ((1.0, 1.0), (0.0, 0.0), (1.0, -1.5), (3.0, 0.5))


class JointTrainer(PairRun[JointTraining], SearchRun[JointTraining, TrainedPair]):
    """A run that searches a dispatcher and an order for all engines behind it."""

    settings = JointTraining

    def __init__(self, config: JointTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        if config.start:
            self._begin(*self._start(), _NARROW)
        else:
            self._begin(self._orders()[0], self.dispatch_space.guesses()[0], _WIDE)

    @property
    @override
    def described(self) -> dict[str, float | int | str]:
        return {"algorithm": "cross-entropy search", "generations": self.generation}

    def _begin(self, order: FloatArray, dispatch: FloatArray, spread: float) -> None:
        """Make the searches anew, around some weights."""
        self.searches = [
            Search(start.copy(), np.full(len(start), spread)) for start in (order, dispatch)
        ]

    def _orders(self) -> list[FloatArray]:
        """Return orders from which the search may begin: tokens left times powers of the prompt.

        Near to `footprint`, with which they share the exponents; shortest remaining first is one.
        """
        scale, space = self.order_space.scale, self.order_space
        left, prompt = scale[PREDICTED_REMAINING_TOKENS], scale[PROMPT_TOKENS]
        return [
            space.guess(
                *(
                    {PREDICTED_REMAINING_TOKENS: left, PROMPT_TOKENS: power * prompt}
                    for power in powers
                )
            )
            for powers in _POWERS
        ]

    def validate(self) -> Validated:
        """Play the validation episodes under the means of both searches."""
        means = [search.mean[None] for search in self.searches]
        return self.validated_by(self._play(means, self._validation))

    def open_stage(self) -> None:
        """Begin where it is best to, then put hidden units beside both linear scores."""
        if self.stage == 0 and self.config.start:
            return  # it has begun there
        if self.stage == 0:
            orders, dispatches = self._orders(), self.dispatch_space.guesses()
            pairs = list(itertools.product(orders, dispatches))
            thetas = [np.array(part) for part in zip(*pairs, strict=True)]
            least = int(self._loss(thetas).argmin())
            self._begin(*pairs[least], _WIDE)
            return
        order, dispatch = (best.numpy() for best in self.best)
        count = self.config.num_hidden
        order = self.order_space.with_units(order, count, self._rng)
        dispatch = self.dispatch_space.with_units(dispatch, count, self._rng)
        self.best = [torch.from_numpy(order), torch.from_numpy(dispatch)]
        self._begin(order, dispatch, _NARROW)

    def _loss(self, thetas: list[FloatArray]) -> FloatArray:
        """Return the mean loss of each of some weights of both on new episodes, `float64[C]`."""
        config = self.config
        episodes = self.episodes(self.draw_first_seed(), config.num_episodes, config.num_requests)
        found: FloatArray = losses(self.scenario, self._play(thetas, episodes))
        return found.reshape(-1, len(episodes)).mean(1)

    def improve(self) -> dict[str, float]:
        """Narrow one of the distributions once, against the mean of the other."""
        turn, count = self.generation % 2, self.config.num_candidates
        tried = self.searches[turn].draw(self._rng, count)
        thetas = [np.tile(search.mean, (count, 1)) for search in self.searches]
        thetas[turn] = tried
        found = self.searches[turn].update(tried, self._loss(thetas), max(1, count // 4))
        spread = np.concatenate([search.spread for search in self.searches])
        return {"rollout/return": -found, "train/spread": float(spread.mean())}

    @override
    def parameters(self) -> list[Tensor]:
        return [torch.from_numpy(search.mean.copy()) for search in self.searches]

    @override
    def state(self) -> dict[str, Any]:
        return {
            "searches": [search.state() for search in self.searches],
            "rng": json.dumps(self._rng.bit_generator.state),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self.searches = [Search.of(state) for state in content["searches"]]
        self._rng.bit_generator.state = json.loads(content["rng"])
        self.take_best()
