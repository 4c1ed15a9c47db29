"""Training an order inside an engine: a search over the weights of a perceptron.

First a score that is linear in the logarithms of a request's features, some twenty numbers: it can
be any product of powers, of which shortest remaining first is one. Then hidden units beside it. All
candidates of a generation play the same episodes, in compiled code, so what arrivals do cancels.
What is kept is what is best on validation episodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from servegym.cluster.spec import Episode
from servegym.train.order_run import OrderRun, Trained
from servegym.train.ordering_settings import OrderingTraining
from servegym.train.request_run import losses
from servegym.train.run_folder import StoredRun
from servegym.train.search import Search
from servegym.train.search_run import SearchRun
from servegym.typing import FloatArray


class OrderingTrainer(OrderRun[OrderingTraining], SearchRun[OrderingTraining, Trained]):
    """A run that searches an order."""

    settings = OrderingTraining

    def __init__(self, config: OrderingTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        guess = self._first_guess()
        self.search = Search(guess, np.full(len(guess), 0.3))

    @property
    @override
    def present(self) -> FloatArray:
        return self.search.mean

    @property
    @override
    def described(self) -> dict[str, float | int | str]:
        return {"algorithm": "cross-entropy search", "generations": self.generation}

    def loss(self, thetas: FloatArray, episodes: list[Episode]) -> FloatArray:
        """Return the mean loss of each of some weights on the same episodes, `float64[C]`."""
        found: FloatArray = losses(self.scenario, self._play(thetas, episodes))
        return found.reshape(len(thetas), len(episodes)).mean(1)

    def open_stage(self) -> None:
        """Put hidden units beside the linear score."""
        if self.stage == 0:
            return
        start = self.space.with_units(self.best.numpy(), self.config.num_hidden, self._rng)
        self.best = torch.from_numpy(start)
        self.search = Search(start.copy(), np.full(len(start), 0.1))

    def improve(self) -> dict[str, float]:
        """Narrow the distribution once."""
        config, search = self.config, self.search
        first_seed = self.draw_first_seed()
        episodes = self.episodes(first_seed, config.num_episodes, config.num_requests)
        tried = search.draw(self._rng, config.num_candidates)
        found = search.update(tried, self.loss(tried, episodes), config.num_candidates // 4)
        return {"rollout/return": -found, "train/spread": float(search.spread.mean())}

    @override
    def state(self) -> dict[str, Any]:
        return {"search": self.search.state(), "rng": json.dumps(self._rng.bit_generator.state)}

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self.search = Search.of(content["search"])
        self._rng.bit_generator.state = json.loads(content["rng"])
        self.take_best()
