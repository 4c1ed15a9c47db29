"""Stages of a pipeline: vLLM's split, costs by hand, rounds against every event of a pipeline."""

from __future__ import annotations

import pytest

from servegym.assets.specs import gpu, model
from servegym.commands.costs import Costs
from servegym.costs.explain import stages_table
from servegym.costs.pipeline import NetworkLink, PipelineCost, stage_layers
from servegym.costs.step import StepCost
from servegym.errors import ConfigError

DECODES = {"tokens": 32.0, "batch": 32.0, "kv_tokens": 32768.0}


def pipeline(pp: int, *, tp: int = 1, name: str = "Llama-3.1-8B", gb_per_s: float = 0.0):
    link = NetworkLink(1e9 * gb_per_s, 1e-5) if gb_per_s else None
    return PipelineCost(StepCost(gpu("H100-SXM-80GB"), model(name), tp), pp, link)


@pytest.mark.parametrize(
    ("layers", "num_stages", "split"),
    [
        (32, 1, (32,)),
        (32, 4, (8, 8, 8, 8)),
        (22, 4, (5, 6, 6, 5)),
        (5, 3, (2, 2, 1)),
        (4, 3, (1, 2, 1)),
        (3, 2, (2, 1)),
    ],
)
def test_layers_are_split_as_vllm_splits_them(layers, num_stages, split):
    assert stage_layers(layers, num_stages) == split


def test_one_stage_is_the_plain_step_to_the_last_bit():
    one = pipeline(1)
    assert one.stage_s(**DECODES) == (sum(one.whole.terms(**DECODES).values()),)
    assert one.latency_s(**DECODES) == one.round_s(1, **DECODES) == one.stage_s(**DECODES)[0]
    assert one.kv_capacity_tokens() == one.whole.kv_capacity_tokens()
    assert (one.status, one.evidence) == (one.whole.status, one.whole.evidence)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "DeepSeek-R1", "gpt-oss-120b"])
def test_stages_add_up_to_the_whole_step_and_a_cpu_time_for_each(name):
    split = pipeline(3, tp=8, name=name)
    terms = split.whole.terms(**DECODES)
    expected = sum(terms.values()) + 2 * terms["cpu"]
    assert sum(split.stage_s(**DECODES)) == pytest.approx(expected, rel=1e-12)
    assert sum(one.model.window_layers for one in split.stages) == split.whole.model.window_layers
    assert [one.model.dense_layers for one in split.stages[1:]] == [0, 0]


def test_the_output_head_is_on_the_last_stage_alone():
    first_s, last_s = pipeline(2).stage_s(**DECODES)
    assert last_s - first_s == pytest.approx(
        pipeline(2).whole.terms(**DECODES)["output head"], rel=1e-9
    )


def test_a_transfer_over_a_network_has_its_shares_of_two_tensors():
    # 2 tensors x 2 bytes x 32 tokens x 4,096 elements = 524,288 bytes, at 10 GB/s
    assert pipeline(2, gb_per_s=10.0).handover_s(32.0) == pytest.approx(1e-5 + 5.24288e-5)
    halves = pipeline(2, tp=2, gb_per_s=10.0)
    gathered_s = 2 * halves.whole.operators.all_gather_s(262144.0, 2)
    assert gathered_s > 0.0
    assert halves.handover_s(32.0) == pytest.approx(1e-5 + 2.62144e-5 + gathered_s)


def test_a_transfer_on_one_node_takes_what_two_gpus_take_to_add():
    split = pipeline(2)
    assert split.handover_s(32.0) == 2 * split.whole.operators.all_reduce_s(262144.0, 2)
    assert split.status == "extrapolated"
    assert split.evidence[-1].kind == "prior"


def round_by_events(split: PipelineCost, batches: list[dict[str, float]]) -> float:
    """Seconds a round of a pipeline of which every start and end is computed.

    A stage takes batches in their order, one at a time; a batch returns to the first stage when
    it has left the last.
    """
    work = [split.stage_s(**one) for one in batches]
    moved = [split.handover_s(one["tokens"]) for one in batches]
    free = [0.0] * split.pp
    back, ends = [0.0] * len(batches), []
    for _ in range(400):
        for number, seconds in enumerate(work):
            now_s = back[number]
            for stage, busy_s in enumerate(seconds):
                arrived_s = now_s + (moved[number] if stage else 0.0)
                now_s = free[stage] = max(arrived_s, free[stage]) + busy_s
            back[number] = now_s
        ends.append(back[0])
    return (ends[-1] - ends[199]) / 200


@pytest.mark.parametrize("gb_per_s", [0.0, 10.0, 0.1])
@pytest.mark.parametrize("in_flight", [1, 2, 3, 4])
def test_rounds_of_equal_batches_are_those_of_every_event(in_flight, gb_per_s):
    split = pipeline(4, gb_per_s=gb_per_s)
    exact_s = round_by_events(split, [DECODES] * in_flight)
    assert split.round_s(in_flight, **DECODES) == pytest.approx(exact_s, rel=1e-9)


def test_rounds_of_unequal_batches_are_off_by_their_difference():
    split = pipeline(2)
    unequal = [{"tokens": n, "batch": n, "kv_tokens": 1024.0 * n} for n in (16.0, 48.0)]
    exact_s = round_by_events(split, unequal)
    # the larger batch goes through both stages while the smaller one waits for either
    assert exact_s / split.round_s(2, **DECODES) == pytest.approx(1.06, abs=0.01)


def test_stages_that_are_alike_share_a_column_of_the_table():
    heads = [str(column.header) for column in stages_table("8", pipeline(8)).columns]
    assert heads[1:-3] == ["stages 1 to 7", "stage 8"]  # with the output head
    assert [str(column.header) for column in stages_table("2", pipeline(2)).columns][1:3] == [
        "stage 1",
        "stage 2",
    ]


def test_the_smallest_stage_decides_how_much_kv_fits():
    split = pipeline(3)
    assert [one.model.layers for one in split.stages] == [11, 11, 10]
    # by hand: 90 % of the memory less 1.7 GB, 11 layers of 218,103,808 weights in 2 bytes and
    # an embedding of 128,256 x 4,096; 4,096 bytes of KV a token and layer
    memory = 0.9 * gpu("H100-SXM-80GB").memory_bytes - 1.7e9
    first = int((memory - 2 * (11 * 218_103_808 + 128_256 * 4096)) / (11 * 4096))
    middle = int((memory - 2 * 11 * 218_103_808) / (11 * 4096))
    assert split.stage_kv_tokens()[:2] == (first, middle)
    assert split.kv_capacity_tokens() == min(split.stage_kv_tokens()) == first


def test_a_model_too_large_for_a_node_fits_two():
    with pytest.raises(ConfigError, match="do not fit"):
        pipeline(1, tp=8, name="Llama-3.1-405B").kv_capacity_tokens()
    assert pipeline(2, tp=8, name="Llama-3.1-405B").kv_capacity_tokens() > 100_000
    with pytest.raises(ConfigError, match=r"stage 1 of 2: .* or raise pp"):
        pipeline(2, tp=4, name="Llama-3.1-405B").kv_capacity_tokens()


@pytest.mark.parametrize("pp", [0, -1, 33])
def test_every_stage_needs_a_layer(pp):
    with pytest.raises(ConfigError, match=f"pp must be from 1 to the 32 layers .* got {pp}"):
        pipeline(pp)


@pytest.mark.parametrize("batches", [0, 3])
def test_no_more_batches_are_in_flight_than_stages(batches):
    with pytest.raises(ConfigError, match=f"from 1 to pp = 2 batches are in flight, got {batches}"):
        pipeline(2).round_s(batches, **DECODES)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"pp": 0}, "pp must be from 1"),
        ({"pp": 2, "pp_link_gb_per_s": 0.0}, "more than 0 bytes/s"),
        ({"pp": 2, "pp_link_latency_s": 1.0}, "give pp_link_gb_per_s, too"),
        ({"pp_link_gb_per_s": 1.0}, "give pp, too"),
    ],
)
def test_the_command_says_what_is_wrong(asked, said):
    with pytest.raises(ConfigError, match=said):
        Costs(**asked).run()


def test_the_command_shows_the_stages(capsys):
    Costs(pp=3).run()
    shown = capsys.readouterr().out
    assert "stage 3" in shown
    assert "11 + 11 + 10 layers" in shown
    assert f"{pipeline(3).kv_capacity_tokens():,} tokens" in shown
