"""Latent attention: forms by hand, times that follow the tables, laws, evidence."""

from __future__ import annotations

import numpy as np
import pytest

from kernel_tables.fitting import held_out_error
from servegym.assets.specs import gpu, model
from servegym.costs import mla
from servegym.costs.package import tables_installed
from servegym.costs.roofline import RooflineSource
from servegym.costs.source import LatentHeads
from servegym.costs.step import StepCost

DEEPSEEK = LatentHeads(heads=16, head_dim=128, latent_dim=512, rope_dim=64)
MEASURED_GPUS = ["A100-SXM-80GB", "L40S", "H100-SXM-80GB", "H200-SXM-141GB", "B200-SXM-180GB"]
needs_tables = pytest.mark.skipif(not tables_installed(), reason="needs aiconfigurator-core")


def test_a_prompt_attends_with_keys_of_192_and_values_of_128_elements():
    operator = mla.prefill(4, 8, DEEPSEEK, 16)
    pairs = 16 * (9 + 10 + 11 + 12)
    assert operator.flops == 2 * (192 + 128) * pairs
    # 12 keys and values, 4 queries and results a head, two bytes an element
    assert operator.num_bytes == 2 * 16 * 320 * (12 + 4)


@pytest.mark.parametrize(("fp8_kv", "kv_bytes"), [(False, 2), (True, 1)])
def test_all_heads_of_a_decode_read_the_same_latents(fp8_kv, kv_bytes):
    shape = LatentHeads(16, 128, 512, 64, fp8_kv=fp8_kv)
    operator = mla.decode(2, 300, shape, 16)
    assert operator.cold_bytes == kv_bytes * 576 * 300
    assert operator.num_bytes - operator.cold_bytes == 2 * 2 * 16 * (576 + 512)
    # each head: products with 576 elements as key, 512 as value
    assert operator.flops == 2 * 16 * (576 + 512) * 300


def test_absorbing_computes_what_expanding_would():
    assert DEEPSEEK.expansion == (16 * 256, 512)
    assert mla.absorption(7, DEEPSEEK, 16).flops == 2 * 7 * 16 * 256 * 512


@needs_tables
@pytest.mark.parametrize("name", MEASURED_GPUS)
@pytest.mark.parametrize("kernel", ["prefill bf16", "decode bf16", "absorption"])
def test_stated_errors_are_those_of_the_fits(name, kernel):
    from kernel_tables import latent as data

    spec = gpu(name)
    kind, *kv = kernel.split(" ")
    table = getattr(data, f"package_{kind}")(spec.aic_system, *kv)
    fit = spec.mla[kernel]
    assert fit.num_held_out == table.held_out.sum() > 50
    assert fit.error == held_out_error(fit, table, spec.bf16_flops, spec.memory_bytes_per_s)
    assert fit.error[0] < 6


@needs_tables
@pytest.mark.parametrize("name", ["H100-SXM-80GB", "H200-SXM-141GB", "B200-SXM-180GB"])
def test_operators_add_up_to_whole_modules_that_nothing_was_fitted_on(name):
    from kernel_tables import latent as data

    table = data.package_modules(gpu(name).aic_system, "decode", "fp8-block", "bf16")
    cost = StepCost(gpu(name), model("DeepSeek-V3"), 8, fp8=True, engine="trtllm", scales="block")
    mine = table.heads == 16
    off = []
    for batch, tokens, seconds in zip(
        table.batch[mine], table.tokens[mine], table.seconds[mine], strict=True
    ):
        terms = cost.terms(batch, batch=batch, kv_tokens=batch * tokens)
        parts = ("attention GEMMs", "attention launch", "decode attention")
        off.append(sum(terms[part] for part in parts) / 61 / seconds - 1)
    assert len(off) > 100
    assert np.median(np.abs(off)) < 0.1


def test_an_unmeasured_gpu_takes_the_shares_of_ordinary_attention():
    spec = gpu("L4")
    assert not spec.mla
    fit = mla.kernel_fit(spec, "decode", DEEPSEEK)
    assert fit.prior
    assert (fit.eff_bytes, fit.eff_flops) == (spec.decode.eff_bytes, spec.prefill.eff_flops)
    assert {e.kind for e in mla.latent_evidence(spec, DEEPSEEK)} == {"prior"}


def test_the_same_chip_lends_its_shares_as_priors():
    assert mla.kernel_fit(gpu("B300-SXM-270GB"), "decode", DEEPSEEK).prior
    assert mla.kernel_fit(gpu("B200-SXM-180GB"), "decode", DEEPSEEK).source


def test_other_sizes_than_the_measured_ones_are_extrapolated():
    spec = gpu("H200-SXM-141GB")
    assert {e.kind for e in mla.latent_evidence(spec, DEEPSEEK)} == {"interpolated"}
    narrow = LatentHeads(16, 128, 256, 64)
    assert {e.kind for e in mla.latent_evidence(spec, narrow)} == {"extrapolated"}


@pytest.mark.parametrize("name", [*MEASURED_GPUS, "L4", "B300-SXM-270GB"])
@pytest.mark.parametrize("fp8_kv", [False, True])
def test_no_decode_beats_the_memory(name, fp8_kv):
    spec = gpu(name)
    source = RooflineSource(spec)
    shape = LatentHeads(16, 128, 512, 64, fp8_kv=fp8_kv)
    for batch, context in ((1, 64), (8, 4096), (64, 2048), (256, 8192)):
        tokens = float(batch * context)
        read_s = (1 if fp8_kv else 2) * 576 * tokens / spec.memory_bytes_per_s
        seconds = source.latent_decode_s(batch, tokens, shape) + source.attention_launch_s()
        assert seconds >= read_s


@pytest.mark.parametrize("name", MEASURED_GPUS)
def test_fewer_heads_take_no_longer(name):
    source = RooflineSource(gpu(name))
    heads = (128, 64, 32, 16, 8)
    shapes = [LatentHeads(h, 128, 512, 64) for h in heads]
    decode = [source.latent_decode_s(64, 64 * 4096.0, shape) for shape in shapes]
    prefill = [source.latent_prefill_s(2048, 4096.0, shape) for shape in shapes]
    assert np.all(np.diff(prefill) < 0)
    # kernels of many heads use the tensor cores better
    assert np.all(np.diff(decode) < 0.25 * np.array(decode[1:]))


def test_deepseek_runs_on_eight_gpus_with_every_operator_measured():
    cost = StepCost(gpu("H200-SXM-141GB"), model("DeepSeek-R1"), 8, fp8=True)
    terms = cost.terms(64, batch=64, kv_tokens=64 * 2048)
    assert {"experts", "shared experts", "MLP", "router"} <= set(terms)
    assert {e.kind for e in cost.evidence if e.operator.startswith("latent")} == {"interpolated"}
    # 671 GB of fp8 and 6 GB of copies in 90 % of 8 x 151 GB less 1.7 GB each: 394 GB for latents
    # of 70 kB, eight times each
    assert cost.kv_capacity_tokens() == pytest.approx(394.3e9 / (8 * 70272), rel=0.01)
