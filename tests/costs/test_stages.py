"""The compiled stages of a pipeline against the costs they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.assets.specs import gpu, model
from servegym.costs.grid import NUM_DENSE_KNOTS
from servegym.costs.pipeline import PipelineCost
from servegym.costs.stages import StageGrids
from servegym.costs.step import StepCost
from servegym.costs.uncertainty import Uncertainty, World
from servegym.errors import ConfigError

from ..toys import token_grid  # noqa: TID252 - tests are no package

DECODES = {"tokens": 32.0, "batch": 32.0, "kv_tokens": 32768.0}


@pytest.fixture(scope="module")
def pipeline() -> PipelineCost:
    return PipelineCost(StepCost(gpu("H100-SXM-80GB"), model("Llama-3.1-8B")), 3)


@pytest.fixture(scope="module")
def grids(pipeline: PipelineCost) -> StageGrids:
    return StageGrids.of(pipeline, 2048)


def test_compiled_stages_are_those_of_the_cost(pipeline, grids):
    # 11 + 11 + 10 layers, the output head on the last; grids are linear between knots
    got = grids.stage_s([], 32, 32768)
    assert got == pytest.approx(pipeline.stage_s(**DECODES), rel=0.02)
    assert grids.stages[0] is grids.stages[1]
    prefill = pipeline.stage_s(tokens=512.0, chunk=512.0, context=1024.0)
    assert grids.stage_s([(512, 1024)]) == pytest.approx(prefill, rel=0.03)


def test_handover_is_that_of_the_cost_at_every_knot(pipeline, grids):
    knots = grids.stages[0].dense_tokens
    want = [pipeline.handover_s(tokens) for tokens in knots]
    np.testing.assert_allclose([grids.handover(tokens) for tokens in knots], want, rtol=1e-12)


def test_round_is_that_of_equal_batches_on_the_slowest_stage():
    # 3 stages; 6 decodes are 2 a batch: 3 x (1 + 2 x 0.1) on the slowest
    stages = StageGrids(
        (token_grid(0.5, 0.1), token_grid(1.0, 0.1), token_grid(0.8, 0.1)),
        np.zeros(NUM_DENSE_KNOTS),
    )
    assert stages.shared_round.step_s([], 6, 60) == pytest.approx(3.6, rel=1e-12)


def test_stages_are_off_as_the_whole_is_in_a_world(pipeline, grids):
    doubt = Uncertainty.of("H100-SXM-80GB", pipeline.whole, grids.stages[0])
    off = doubt.stages_in_world(grids, World(7))
    factor = doubt.factors(World(7))
    assert len(off.stages) == len(grids.stages) > 1
    for stage, plain in zip(off.stages, grids.stages, strict=True):
        np.testing.assert_allclose(stage.decode_s, factor["decode"] * plain.decode_s)
        assert stage.cpu_s == pytest.approx(factor["cpu"] * plain.cpu_s)
        ratio = stage.dense_s / plain.dense_s
        parts = {factor[term] for term in doubt.parts_s}
        assert (ratio >= min(parts) - 1e-9).all()
        assert (ratio <= max(parts) + 1e-9).all()


def test_wrong_pipelines_are_refused():
    with pytest.raises(ConfigError, match="at least 1 stage"):
        StageGrids((), np.zeros(NUM_DENSE_KNOTS))
    with pytest.raises(ConfigError, match="handover_s must have shape"):
        StageGrids((token_grid(1.0, 0.1),), np.zeros(3))
    with pytest.raises(ConfigError, match="not negative"):
        StageGrids((token_grid(1.0, 0.1),), np.full(NUM_DENSE_KNOTS, -1.0))
