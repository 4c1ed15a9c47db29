"""Jobs of tasks whose durations come from the kernel costs: post-training and layers."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.assets.specs import gpu, model
from servegym.costs.roofline import RooflineSource
from servegym.costs.source import Heads
from servegym.costs.step import StepCost
from servegym.errors import ConfigError
from servegym.workflow.graph import WorkflowError
from servegym.workflow.workloads.device_cost import device_cost
from servegym.workflow.workloads.post_training import PostTraining
from servegym.workflow.workloads.transformer_layer import TransformerLayer
from servegym.workloads.mixtures import LengthConfig

H100, A100, L40S, L4 = "H100-SXM-80GB", "A100-SXM-80GB", "L40S", "L4"


def fixed(tokens):
    return LengthConfig(medians_tokens=(float(tokens),), sigmas=(0.0,))


@pytest.fixture(scope="module")
def run():
    family = PostTraining(num_sequences=64, num_shards=2, iterations=2, output=fixed(200))
    return family.job(np.random.default_rng(0))


def bytes_between(job, parent, child):
    return job.data_bytes[(job.label[job.parent] == parent) & (job.label[job.child] == child)]


def test_iteration_generates_judges_and_trains(run):
    assert run.label.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5] * 2
    assert run.parent[run.child == 8].tolist() == list(range(8))
    assert run.parent[run.child == 10].tolist() == [8]
    assert run.parent[run.child == 13].tolist() == [9, 10]


def test_models_that_move_are_the_bytes_of_edges(run):
    weights = 2 * model("Llama-3.1-8B").num_params
    assert (bytes_between(run, 4, 0) == weights).all()
    assert (bytes_between(run, 5, 3) == weights).all()
    assert (bytes_between(run, 4, 4) == 8 * weights).all()
    samples = 32 * (512 + 200)
    assert (bytes_between(run, 0, 2) == 8 * samples).all()
    assert (bytes_between(run, 2, 4) == 4 * samples).all()


def test_stage_takes_what_the_kernel_costs_say(run):
    step = StepCost(gpu(H100), model("Llama-3.1-8B"), 8)
    # 32 sequences of 712 tokens: one pass of 16,384 tokens and one of the rest
    attention_s = 32 * step.terms(712, chunk=712)["prefill attention"]
    passes_s = sum(step.dense_s(n) + step.operators.cpu_s() for n in (16384, 32 * 712 - 16384))
    assert run.duration_s[1, 0] == pytest.approx(passes_s + attention_s, rel=0.01)
    prompts_s = device_cost(H100, "Llama-3.1-8B", 8).forward_s(np.full(32, 512))
    decode_s = [
        sum(step.terms(32, batch=32, kv_tokens=32 * (512 + done)).values()) for done in range(199)
    ]
    assert run.duration_s[0, 0] == pytest.approx(prompts_s + sum(decode_s), rel=0.01)


def test_faster_gpus_take_less_time(run):
    assert (run.duration_s[:, 0] < run.duration_s[:, 1]).all()
    assert (run.duration_s[:, 1] < run.duration_s[:, 2]).all()


def test_batch_shrinks_as_its_sequences_end():
    node = device_cost(H100, "Llama-3.1-8B", 8)
    whole_s = node.generation_s(100, np.full(64, 1000))
    mixed_s = node.generation_s(100, np.array([10] * 63 + [1000]))
    alone_s = node.generation_s(100, np.array([1000]))
    assert alone_s < mixed_s < whole_s


def test_more_sequences_than_fit_are_generated_in_turns():
    node = device_cost(L40S, "Llama-3.1-8B", 1)
    at_once = node.step.kv_capacity_tokens() // 20000
    one_s = node.generation_s(19000, np.full(at_once, 1000))
    two_s = node.generation_s(19000, np.full(2 * at_once, 1000))
    assert two_s == pytest.approx(2 * one_s, rel=1e-9)


def test_type_without_the_memory_cannot_run_a_stage():
    family = PostTraining(
        device_types=(H100, L4), gpus_per_device=2, num_sequences=4, num_shards=1, iterations=1
    )
    job = family.job(np.random.default_rng(0))
    # 16.06 GB of weights fit two L4s; 128 GB of training state fit two H100s only
    assert np.isfinite(job.duration_s[:4]).all()
    assert np.isfinite(job.duration_s[4:, 0]).all()
    assert np.isinf(job.duration_s[4:, 1]).all()
    with pytest.raises(WorkflowError, match="can run on none of L4"):
        PostTraining(device_types=(L4,), gpus_per_device=1).job(np.random.default_rng(0))


@pytest.fixture(scope="module")
def layer():
    family = TransformerLayer(
        tp=2,
        num_microbatches=1,
        num_prompts=1,
        prompt=fixed(1000),
        num_decodes=8,
        context=fixed(500),
        device_types=(H100, A100),
    )
    return family.job(np.random.default_rng(0))


def test_layer_is_two_halves_with_an_all_reduce_after_each(layer):
    shard = [0, 1, 2, 3]  # QKV, both attentions, output
    assert layer.label.tolist() == [*shard, *shard, 4, 5, 6, 5, 6, 4]
    assert layer.parent[layer.child == 8].tolist() == [3, 7]
    assert layer.parent[layer.child == 3].tolist() == [1, 2]
    assert layer.parent[layer.child == 13].tolist() == [10, 12]


def test_kernels_take_what_the_costs_say(layer):
    op = RooflineSource(gpu(H100))
    m, tokens = model("Llama-3.1-8B"), 1008
    half_s = op.elementwise_s(tokens, m.hidden, 20 * 128, m.ffn_dim // 2) / 2
    expected = [
        op.gemm_s(tokens, (16 + 8) * 128, m.hidden, 2.0) + half_s,
        op.attention_launch_s() + op.prefill_attention_s(1000, 0, Heads(16, 4, 128)),
        op.attention_launch_s() + op.decode_attention_s(8, 4000, Heads(16, 4, 128)),
        op.gemm_s(tokens, m.hidden, 16 * 128, 2.0),
    ]
    assert layer.duration_s[:4, 0] == pytest.approx(expected)
    assert layer.duration_s[8, 0] == pytest.approx(op.all_reduce_s(2 * tokens * m.hidden, 2))


def test_layers_on_one_gpu_take_the_time_of_a_step():
    family = TransformerLayer(
        tp=1, num_microbatches=1, num_prompts=0, num_decodes=32, context=fixed(1000), layers=32
    )
    job = family.job(np.random.default_rng(0))
    terms = StepCost(gpu(H100), model("Llama-3.1-8B")).terms(32, batch=32, kv_tokens=32000)
    beside = terms["cpu"] + terms["output head"]
    assert job.duration_s[:, 0].sum() == pytest.approx(sum(terms.values()) - beside, rel=1e-6)


def test_edges_carry_activations_except_around_an_all_reduce(layer):
    assert (
        layer.data_bytes[(layer.label[layer.child] == 4) | (layer.label[layer.parent] == 4)].sum()
        == 0
    )
    # QKV to prefill: 1,000 tokens of (16 + 2 x 4) heads of 128 elements
    assert layer.data_bytes[(layer.parent == 0) & (layer.child == 1)] == 2 * 1000 * 24 * 128
    # to decode: also the KV of 8 sequences
    assert layer.data_bytes[(layer.parent == 0) & (layer.child == 2)] == 2 * (
        8 * 24 * 128 + 2 * 4000 * 4 * 128
    )


def test_microbatches_do_not_wait_for_each_other():
    job = TransformerLayer(num_microbatches=3, layers=2).job(np.random.default_rng(0))
    part = job.num_stages // 3
    assert (job.parent // part == job.child // part).all()


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"model": "Mixtral-8x7B"}, "needs a dense model, got Mixtral-8x7B"),
        ({"tp": 3}, "tp must divide the 32 heads, got 3"),
        ({"num_prompts": 0, "num_decodes": 0}, "at least one prompt or decoding sequence"),
        ({"device_types": ("A40",), "tp": 4}, "no all-reduce fit over 4 GPUs"),
        ({"device_types": ("H100",)}, "unknown GPU 'H100'"),
    ],
)
def test_layer_that_cannot_be_is_refused(params, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TransformerLayer(**params).job(np.random.default_rng(0))
