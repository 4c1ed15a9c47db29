"""Scenarios: the bundled ones play, wrong ones are refused in one sentence, draws are fair."""

from __future__ import annotations

from dataclasses import fields
from importlib import resources

import numpy as np
import pytest
import yaml

from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW, FAULT_UP
from servegym.cluster.tier_rules import KvTier, TierRules
from servegym.costs.pipeline import PipelineCost
from servegym.costs.uncertainty import World
from servegym.documents import load_yaml
from servegym.errors import ConfigError, ServeGymError
from servegym.scenario import load_scenario, parse_scenario, scenario_names
from servegym.scenario.fleet import EngineConfig
from servegym.traced_scenario import with_trace

BASE = {
    "name": "tiny",
    "fleet": [{"gpu": "A100-SXM-80GB", "count": 2}],
    "workload": {"kind": "generated", "rate_rps": 5.0},
    "num_requests": 30,
}


def text(*without, **changes):
    data = {key: value for key, value in {**BASE, **changes}.items() if key not in without}
    return yaml.safe_dump(data)


def scenario(**changes):
    return parse_scenario(text(**changes), "tiny.yaml")


HOST = {"gib": 8.0, "gb_per_s": 20.0}


def fleet(**entry):
    return {"fleet": [{"gpu": "A100-SXM-80GB", **entry}]}


def workload(**changes):
    return {"workload": {**BASE["workload"], **changes}}


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


# ---- bundled ----


def test_names_are_sorted_and_include_both_controls():
    names = scenario_names()
    assert names == sorted(names)
    assert {"hetero-prefix", "homogeneous-light", "mixed-chat"} <= set(names)


@pytest.mark.parametrize("name", scenario_names())
def test_a_bundled_scenario_gives_a_valid_episode(name):
    bundled = load_scenario(name)
    assert bundled.name == name
    assert bundled.description
    episode = bundled.episode(0)
    episode.validate(bundled.spec)
    assert len(episode.table) == bundled.num_requests
    assert 1 <= episode.num_replicas <= bundled.max_replicas


@pytest.mark.parametrize("name", scenario_names())
def test_a_seed_gives_one_episode(name):
    bundled = load_scenario(name)
    first, again, other = (bundled.episode(seed, num_requests=64) for seed in (1, 1, 2))
    assert same(first.table, again.table)
    assert same(first.faults, again.faults)
    assert first.noise_seed == again.noise_seed != other.noise_seed
    assert not np.isclose(first.table.arrival_s, other.table.arrival_s).all()


def test_a_path_loads_as_a_name_does(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text())
    assert load_scenario(path) == load_scenario(str(path)) == scenario()


# ---- episodes ----


@pytest.mark.parametrize("name", ["short-kv", "bursts"])
def test_the_router_may_hold_in_what_else_is_the_suites_scenario(name):
    folder = resources.files("servegym.assets").joinpath("suites/servegym-bench-v1")
    suites = load_scenario(str(folder.joinpath(f"{name}.yaml")))
    held = load_scenario(f"{name}-hold")
    assert (suites.actions.hold, held.actions.hold) == (False, True)
    same = {"name": suites.name, "description": suites.description, "actions": suites.actions}
    assert held.model_copy(update=same) == suites


def test_the_requests_of_a_seed_are_the_same_on_every_fleet():
    small, large = scenario(**fleet(count=1)), scenario(**fleet(count=[3, 9], speed=[0.5, 2.0]))
    assert same(small.episode(4).table, large.episode(4).table)


def test_load_halves_the_gaps():
    once, twice = scenario().episode(4), scenario().episode(4, load=2.0)
    np.testing.assert_allclose(twice.table.arrival_s, once.table.arrival_s / 2)
    assert np.array_equal(twice.table.prompt_tokens, once.table.prompt_tokens)


def test_ranges_are_drawn_for_every_episode():
    ranged = scenario(**fleet(count=[2, 4], speed=[0.5, 1.5]))
    episodes = [ranged.episode(seed, num_requests=1) for seed in range(60)]
    assert {e.num_replicas for e in episodes} == {2, 3, 4}
    speeds = np.concatenate([e.speed for e in episodes])
    assert 0.5 <= speeds.min() < 0.6
    assert 1.4 < speeds.max() <= 1.5
    assert ranged.max_replicas == 4


def test_replicas_come_in_the_order_of_the_fleet():
    mixed = scenario(
        fleet=[{"gpu": "L40S", "count": 2, "num_blocks": 77}, {"gpu": "A40", "speed": 0.5}]
    )
    episode = mixed.episode(0)
    assert episode.type_idx.tolist() == [0, 0, 1]
    assert episode.speed.tolist() == [1.0, 1.0, 0.5]
    assert [t.name for t in mixed.spec.types] == ["L40S x1", "A40 x1"]
    assert mixed.spec.types[0].num_blocks == 77


def test_an_entry_can_form_its_steps_ahead():
    mixed = scenario(fleet=[{"gpu": "L40S", "async_scheduling": True}, {"gpu": "L40S"}])
    assert [t.async_scheduling for t in mixed.spec.types] == [True, False]
    assert [t.name for t in mixed.spec.types] == ["L40S x1 async", "L40S x1"]


def test_stages_share_the_layers_and_have_the_blocks_of_the_tightest():
    # 141 GB of weights do not fit one A100; halves of 40 layers do, the last with the output head
    staged = scenario(
        model="Llama-3.1-70B",
        fleet=[{"gpu": "A100-SXM-80GB", "pipeline_parallel_size": 2}],
        engine={"kv_memory_fraction": 0.95},
    )
    (kind,) = staged.spec.types
    assert (kind.name, kind.num_gpus, kind.num_stages) == ("A100-SXM-80GB x1 pp2", 2, 2)
    fits = PipelineCost(staged.step_cost(staged.fleet[0]), 2).stage_kv_tokens(0.95)
    assert kind.num_blocks == min(fits) // 16
    first_s, last_s = kind.pipeline.stage_s([], 8, 8000)
    assert 0 < first_s < last_s
    assert kind.price_usd_per_h == 2 * scenario().spec.types[0].price_usd_per_h
    world = staged.in_world(World(3)).spec.types[0]
    assert world.pipeline.stage_s([], 8, 8000) != (first_s, last_s)


def test_an_entry_can_draft_tokens():
    drafts = {"num_speculative_tokens": 2, "acceptance_rates": [0.8, 0.5]}
    plain, drafting, alike = scenario(
        fleet=[
            {"gpu": "L40S"},
            {"gpu": "L40S", "speculative_config": drafts},
            {
                "gpu": "L40S",
                "speculative_config": {"num_speculative_tokens": 3, "acceptance_rates": 0.5},
            },
        ]
    ).spec.types
    assert [t.name for t in (plain, drafting)] == ["L40S x1", "L40S x1 2 drafts"]
    assert drafting.speculation.acceptance == (0.8, 0.5)
    assert alike.speculation.acceptance == (0.5, 0.25, 0.125)
    assert drafting.num_blocks < plain.num_blocks
    assert drafting.step_s([], 8, 8000) < plain.step_s([], 8, 8000)


def test_a_world_has_other_drafts():
    drafts = {"num_speculative_tokens": 1, "acceptance_rates": 0.8}
    drafting = scenario(**fleet(speculative_config=drafts))
    world = drafting.in_world(World(3)).spec.types[0]
    (kind,) = drafting.spec.types
    assert world.speculation.step_s([], [(2, 100)]) != kind.speculation.step_s([], [(2, 100)])
    assert world.step_s([], 8, 8000) != kind.step_s([], 8, 8000)


def test_prefills_take_as_long_as_their_launches_and_stages_launch_their_share():
    entry = {"gpu": "A100-SXM-80GB", "eager_prefill_s": 0.08}
    (plain,) = scenario(fleet=[entry]).spec.types
    assert plain.grid.step_s([(1, 0)]) == 0.08
    assert plain.grid.step_s([], 1, 100) < 0.08
    (staged,) = scenario(fleet=[{**entry, "pipeline_parallel_size": 2}]).spec.types
    assert staged.pipeline.stage_s([(1, 0)]) == (0.04, 0.04)


def test_stages_on_nodes_of_their_own_are_linked():
    entry = {"gpu": "A100-SXM-80GB", "tp": 8, "pipeline_parallel_size": 2}
    slow, fast = (
        scenario(fleet=[{**entry, "pp_link": {"gb_per_s": rate}}]).spec.types[0]
        for rate in (1.0, 50.0)
    )
    assert slow.pipeline.handover(512) > fast.pipeline.handover(512) > 0
    assert slow.pipeline.stage_s([(512, 0)]) == fast.pipeline.stage_s([(512, 0)])


def test_a_replica_of_several_gpus_costs_their_rent_and_holds_what_fits():
    spec = scenario(**fleet(tp=2)).spec
    one = scenario().spec.types[0]
    two = spec.types[0]
    assert two.num_gpus == 2
    assert two.price_usd_per_h == 2 * one.price_usd_per_h
    # 0.9 * 80 GiB - 16.06 GB of weights - 1.7 GB = 59.549 GB of 16 * 131,072 bytes: 28,395 blocks
    assert one.num_blocks == 28_395
    # 2 * 0.9 * 80 GiB - 16.06 GB - 3.4 GB = 135.159 GB: 64,448 blocks
    assert two.num_blocks == 64_448


def test_predictions_have_the_error_of_the_scenario():
    predictor = {"disturbances": {"predictor": {"kind": "lognormal", "sigma": 0.3}}}
    lengths = workload(output={"medians_tokens": [5000.0], "max_tokens": 100_000})
    table = scenario(num_requests=5000, **predictor, **lengths).episode(0).table
    error = np.log(table.predicted_output_tokens / table.output_tokens)
    assert error.std() == pytest.approx(0.3, rel=0.05)


def test_predictions_do_not_move_the_requests():
    sure = scenario(disturbances={"predictor": {"kind": "perfect"}}).episode(0).table
    vague = scenario(disturbances={"predictor": {"kind": "mean"}}).episode(0).table
    assert np.array_equal(sure.arrival_s, vague.arrival_s)
    assert np.array_equal(sure.output_tokens, vague.output_tokens)
    assert not np.array_equal(sure.predicted_output_tokens, vague.predicted_output_tokens)


def test_faults_come_at_their_rates_and_end_after_their_time():
    # 4 replicas for some 10,000 s at 36 faults an hour each: 4 * 10,000 * 0.01 = 400 less those
    # that fall into the 10 s of another one: the cycle is 110 s, so 364
    trouble = {"rate_per_replica_hour": 36.0}
    troubled = scenario(
        num_requests=10_000,
        **fleet(count=4),
        **workload(rate_rps=1.0),
        disturbances={
            "fail_slow": {**trouble, "duration_s": 10.0, "multiplier": [0.2, 0.6]},
            "fail_stop": {**trouble, "recovery_s": 10.0},
        },
    )
    episode = troubled.episode(0)
    faults = episode.faults
    episode.validate(troubled.spec)
    slow = (faults.kind == FAULT_SLOW) & (faults.value < 1)
    assert ((faults.value[slow] >= 0.2) & (faults.value[slow] <= 0.6)).all()
    assert slow.sum() == pytest.approx(364, abs=60)  # a standard deviation of 19 or less
    assert (faults.kind == FAULT_DOWN).sum() == pytest.approx(364, abs=60)
    for replica in range(4):
        mine = faults.replica == replica
        down = faults.time_s[mine & (faults.kind == FAULT_DOWN)]
        up = faults.time_s[mine & (faults.kind == FAULT_UP)]
        np.testing.assert_allclose(up - down, 10.0)


def test_tiers_hold_what_fits_their_memory():
    tiers = {"host_kv": HOST, "disk_kv": {"gib": 100.0, "gb_per_s": 7.0, "write_gb_per_s": 5.0}}
    store = {"gib": 1000.0, "gb_per_s": 80.0, "link_gb_per_s": 10.0, "latency_s": 0.002}
    made = scenario(**fleet(**tiers), kv_store=store, kv_tiers={"load": "faster"})
    # 128 KiB a token of Llama-3.1-8B and 16 tokens a block: 2 MiB
    assert made.spec.types[0].host_kv == KvTier(8 * 512, 20e9, 20e9)
    assert made.spec.types[0].disk_kv == KvTier(100 * 512, 7e9, 5e9)
    rules = TierRules("faster", 1.0, KvTier(1000 * 512, 10e9, 10e9, 0.002), 80e9)
    assert made.spec.tiers == rules
    assert made.spec.tiered
    assert not scenario().spec.tiered


def test_prefixes_are_fetched_beside_roles_and_tiers():
    link = {"gb_per_s": 9.0}
    entries = [{"gpu": "L40S", "link": link, "role": role} for role in ("prefill", "decode")]
    made = scenario(
        fleet=[{**entry, "host_kv": HOST} for entry in entries],
        kv_tiers={"balancing_threshold": 1.5, "load": "faster"},
    )
    assert made.spec.tiers == TierRules("faster", balancing_threshold=1.5)
    assert made.spec.disaggregated
    alone = scenario(**fleet(count=2, link=link), kv_tiers={"balancing_threshold": 1.0})
    assert alone.spec.tiered
    assert alone.spec.moves_kv


# ---- wrong input ----

DRAFTS = {"num_speculative_tokens": 1, "acceptance_rates": [0.8]}
WRONG = {
    "unknown key": (text(num_request=5), ["num_request", "num_requests"]),
    "key like none": (text(zzz=5), ["zzz", "num_requests", "workload"]),
    "key in workload": (text(**workload(num_tenant=5)), ["num_tenant", "num_tenants"]),
    "misspelt required key": (
        text(workload={"kind": "generated", "rate_rp": 5}),
        ["did you mean rate_rps"],
    ),
    "unknown GPU": (text(**{"fleet": [{"gpu": "H100"}]}), ["'H100'", "H100-SXM-80GB", "L40S"]),
    "unknown model": (text(model="Llama-3"), ["'Llama-3'", "Mixtral-8x7B", "or Llama-3.1-8B?"]),
    "unknown kind": (text(**workload(kind="generatd")), ["generatd", "generated", "trace"]),
    "no kind": (text(workload={"rate_rps": 5.0}), ["kind", "generated", "trace"]),
    "unknown precision": (text(precision="fp16"), ["fp16", "bf16", "fp8"]),
    "negative rate": (text(**workload(rate_rps=-1.0)), ["rate_rps", "greater than 0", "-1.0"]),
    "rate is a word": (text(**workload(rate_rps="fast")), ["rate_rps", "number", "fast"]),
    "rate without end": (text(**workload(rate_rps=float("inf"))), ["rate_rps", "inf"]),
    "negative SLO": (
        text(slo_classes=[{"name": "a", "ttft_s": -1, "tpot_s": 1}]),
        ["slo_classes.0.ttft_s", "greater than 0", "-1"],
    ),
    "no SLO class": (text(slo_classes=[]), ["slo_classes", "at least 1"]),
    "empty fleet": (text(fleet=[]), ["fleet", "at least 1"]),
    "no fleet": (text("fleet"), ["fleet", "required"]),
    "no replica": (text(**fleet(count=0)), ["count", "0"]),
    "negative count": (text(**fleet(count=-2)), ["count", "-2"]),
    "count is a word": (text(**fleet(count="two")), ["count", "integer", "two"]),
    "count range upside down": (text(**fleet(count=[3, 1])), ["count", "3", "1"]),
    "speed 0": (text(**fleet(speed=0)), ["speed", "greater than 0", "got 0"]),
    "speed range upside down": (text(**fleet(speed=[2.0, 1.0])), ["speed", "2.0", "1.0"]),
    "multiplier upside down": (
        text(
            disturbances={
                "fail_slow": {"rate_per_replica_hour": 36_000.0, "multiplier": [0.6, 0.2]}
            }
        ),
        ["multiplier", "0.6", "0.2"],
    ),
    "no request": (text(num_requests=0), ["num_requests", "1", "0"]),
    "tp 3": (text(**fleet(tp=3)), ["tp", "32 heads", "3"]),
    "tp 4 of A40": (text(fleet=[{"gpu": "A40", "tp": 4}]), ["4", "[1, 2]"]),
    "too large a model": (text(model="Llama-3.1-70B"), ["141 GB", "77 GB", "tp"]),
    "no fp8 units": (text(precision="fp8"), ["fp8", "bf16"]),
    "budget below sequences": (
        text(engine={"max_num_seqs": 4096}),
        ["max_num_batched_tokens", "2048", "4096"],
    ),
    "blocks kept in no cache": (
        text(engine={"prefix_caching": False, "retain_kv_s": 5.0}),
        ["retain_kv_s is 5.0", "prefix_caching"],
    ),
    "steps formed ahead by another engine": (
        text(**fleet(engine="sglang", async_scheduling=True)),
        ["async_scheduling of A100", "must be off", "vllm and trtllm"],
    ),
    "steps formed ahead where KV moves": (
        text(
            fleet=[
                {"gpu": "L40S", "role": "prefill", "link": {"gb_per_s": 9.0}},
                {"gpu": "L40S", "async_scheduling": True, "link": {"gb_per_s": 9.0}},
            ]
        ),
        ["async_scheduling", "turn async_scheduling off"],
    ),
    "more stages than layers": (
        text(**fleet(pipeline_parallel_size=40, pp_link={"gb_per_s": 9.0})),
        ["pipeline_parallel_size", "1 to the 32 layers", "got 40"],
    ),
    "no stage": (text(**fleet(pipeline_parallel_size=0)), ["pipeline_parallel_size", "1", "0"]),
    "stages on several nodes": (
        text(**fleet(tp=8, pipeline_parallel_size=2)),
        ["16 GPUs", "8 of a node", "pp_link: {gb_per_s: 50}"],
    ),
    "a link between one stage": (
        text(**fleet(pp_link={"gb_per_s": 9.0})),
        ["pp_link", "set pipeline_parallel_size"],
    ),
    "stages of another engine": (
        text(**fleet(engine="sglang", pipeline_parallel_size=2)),
        ["engine must be vllm or trtllm", "got sglang"],
    ),
    "stages with steps formed ahead": (
        text(**fleet(pipeline_parallel_size=2, async_scheduling=True)),
        ["A100-SXM-80GB x1 pp2 async has stages", "async_scheduling", "leave one of them out"],
    ),
    "a stage that does not fit": (
        text(model="Llama-3.1-405B", **fleet(pipeline_parallel_size=2)),
        ["stage 1 of 2", "raise"],
    ),
    "drafts of another engine": (
        text(**fleet(engine="sglang", speculative_config=DRAFTS)),
        ["engine must be vllm or trtllm", "speculative_config", "got sglang"],
    ),
    "drafts on stages": (
        text(**fleet(pipeline_parallel_size=2, speculative_config=DRAFTS)),
        ["speculative_config does not go with stages", "pipeline_parallel_size to 1"],
    ),
    "drafts with steps formed ahead": (
        text(**fleet(speculative_config=DRAFTS, async_scheduling=True)),
        ["has drafts and async_scheduling", "leave one of them out"],
    ),
    "fewer rates than drafts": (
        text(**fleet(speculative_config=DRAFTS | {"num_speculative_tokens": 2})),
        ["acceptance_rates must be one number or 2", "got 1"],
    ),
    "rates that increase": (
        text(
            **fleet(
                speculative_config={"num_speculative_tokens": 2, "acceptance_rates": [0.1, 0.2]}
            )
        ),
        ["must not increase", "[0.1, 0.2]"],
    ),
    "a calibration with drafts": (
        text(**fleet(speculative_config=DRAFTS, calibration="mine.json")),
        ["a calibration is of whole steps without drafts"],
    ),
    "negative retention": (text(engine={"retain_kv_s": -5.0}), ["retain_kv_s", "-5.0"]),
    "roles without prefill": (
        text(fleet=[{"gpu": "L40S", "role": "decode", "link": {"gb_per_s": 9.0}}]),
        ["role prefill", "decode or mixed", "got decode"],
    ),
    "prefill without decode": (
        text(**fleet(role="prefill", link={"gb_per_s": 9.0})),
        ["role prefill", "decode or mixed", "got prefill"],
    ),
    "unknown role": (text(**fleet(role="prefil")), ["fleet.0.role", "prefill", "prefil"]),
    "roles without a link": (
        text(fleet=[{"gpu": "L40S", "role": "prefill"}, {"gpu": "L40S"}]),
        ["fleet.0.link is missing", "link: {gb_per_s: 25}"],
    ),
    "roles of another engine": (
        text(
            fleet=[
                {"gpu": "L40S", "role": "prefill", "link": {"gb_per_s": 9.0}},
                {"gpu": "L40S", "engine": "sglang", "link": {"gb_per_s": 9.0}},
            ]
        ),
        ["fleet.1.engine must be vllm", "got sglang"],
    ),
    "transfers of nothing": (
        text(transfers={"lease_s": 5.0}),
        ["transfers.lease_s is set", "role mixed"],
    ),
    "migration without a link": (
        text(migration={"interval_s": 0.1}),
        ["fleet.0.link is missing", "where requests migrate", "link: {gb_per_s: 25}"],
    ),
    "migration of one replica": (
        text(**fleet(count=1, link={"gb_per_s": 9.0}), migration={}),
        ["migration needs two replicas or more"],
    ),
    "migration of another engine": (
        text(**fleet(count=2, engine="sglang", link={"gb_per_s": 9.0}), migration={}),
        ["fleet.0.engine must be vllm or vllm-priority", "got sglang"],
    ),
    "migration between roles": (
        text(
            fleet=[
                {"gpu": "L40S", "role": "prefill", "link": {"gb_per_s": 9.0}},
                {"gpu": "L40S", "link": {"gb_per_s": 9.0}},
            ],
            migration={},
        ),
        ["fleet.0.role must be mixed", "got prefill"],
    ),
    "unknown migration rule": (
        text(**fleet(count=2, link={"gb_per_s": 9.0}), migration={"rule": "freenes"}),
        ["migration.rule", "freeness", "queues"],
    ),
    "unknown reservation": (
        text(transfers={"reservation": "sorce"}),
        ["transfers.reservation", "source", "destination"],
    ),
    "tiers without prefix cache": (
        text(engine={"prefix_caching": False}, **fleet(host_kv=HOST)),
        ["engine.prefix_caching is off", "leave host_kv, disk_kv, kv_store and"],
    ),
    "tiers of another engine": (
        text(**fleet(host_kv=HOST, engine="sglang")),
        ["fleet.0.engine must be vllm", "got sglang"],
    ),
    "peers without links": (
        text(**fleet(count=2), kv_tiers={"balancing_threshold": 1.5}),
        ["fleet.0.link is missing", "fetched from other replicas"],
    ),
    "no peers": (
        text(**fleet(link={"gb_per_s": 9.0}), kv_tiers={"balancing_threshold": 1.5}),
        ["kv_tiers.balancing_threshold needs two replicas", "a fleet of one"],
    ),
    "threshold below one": (
        text(**fleet(count=2), kv_tiers={"balancing_threshold": 0.5}),
        ["kv_tiers.balancing_threshold", "greater than or equal to 1"],
    ),
    "interference of peers": (
        text(
            **fleet(count=2, link={"gb_per_s": 9.0}),
            kv_tiers={"balancing_threshold": 1.5, "interference": 2.0},
        ),
        ["kv_tiers.interference is set", "host_kv"],
    ),
    "tiers and orders that migrate": (
        text(
            **fleet(count=2, link={"gb_per_s": 9.0}, host_kv=HOST, engine="vllm-priority"),
            migration={},
        ),
        ["fleet.0.engine must be vllm", "got vllm-priority"],
    ),
    "rules of no tiers": (
        text(kv_tiers={"interference": 2.0}),
        ["kv_tiers.interference is set", "host_kv", "kv_store"],
    ),
    "tier without size": (text(**fleet(host_kv={"gb_per_s": 9.0})), ["host_kv.gib", "required"]),
    "tier smaller than a block": (
        text(**fleet(host_kv={"gib": 0.001, "gb_per_s": 9.0})),
        ["must hold at least 1 block, got 0"],
    ),
    "unknown rule of loads": (
        text(kv_tiers={"load": "fast"}, **fleet(host_kv=HOST)),
        ["kv_tiers.load", "always", "faster"],
    ),
    "link without speed": (text(**fleet(link={"gb_per_s": 0.0})), ["gb_per_s", "greater than 0"]),
    "request beyond all memory": (
        text(
            **fleet(num_blocks=10), **workload(prompt={"medians_tokens": [5000.0], "sigmas": [0.0]})
        ),
        ["160"],
    ),
    "missing trace": (
        text(workload={"kind": "trace", "path": "nowhere.csv"}),
        ["nowhere.csv", "CSV", "Parquet"],
    ),
    "bad YAML": ("name: tiny\nfleet: [1, 2\nworkload: }\n", ["tiny.yaml", "YAML", "line 3"]),
    "tab in YAML": ("name: tiny\n\tfleet: 1\n", ["tiny.yaml", "YAML", "line 2"]),
    "list": ("- 1\n- 2\n", ["tiny.yaml", "fleet", "workload"]),
    "empty": ("", ["tiny.yaml", "fleet", "workload"]),
}


def open_and_draw(content):
    opened = parse_scenario(content, "tiny.yaml")
    opened.episode(0).validate(opened.spec)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_scenario_is_refused_in_one_sentence(case):
    content, words = WRONG[case]
    with pytest.raises(ServeGymError) as caught:
        open_and_draw(content)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 800  # a list of all models is long
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "near"),
    [
        ({"engine": {"max_num_seq": 5}}, "max_num_seqs"),
        (workload(arrivals={"burst_ratios": 5}), "burst_ratio"),
        (workload(sessions={"mean_turn": 5}), "mean_turns"),
        (workload(prompt={"max_token": 5}), "max_tokens"),
        ({"disturbances": {"predictor": {"sigmas": 0.5}}}, "sigma"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_nearest_key_is_suggested(change, near):
    with pytest.raises(ConfigError, match=rf"did you mean {near}\?"):
        scenario(**change)


def test_a_context_without_room_for_the_system_prompt_is_refused():
    # no conversation would ever fit; checked without drawing one
    narrow = {"system_prompt_tokens": 5000, "max_context_tokens": 4096}
    with pytest.raises(ConfigError, match="max_context_tokens"):
        scenario(**workload(sessions=narrow))


def test_a_trace_of_unknown_extension_is_refused(tmp_path):
    path = tmp_path / "trace.xlsx"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,1,1\n")
    with pytest.raises(ServeGymError) as caught:
        scenario(workload={"kind": "trace", "path": str(path)}).episode(0)
    for word in ("trace.xlsx", "csv", "jsonl", "parquet"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixed-cht", ["'mixed-cht'", "did you mean mixed-chat? Or give a .yaml file", "bench"]),
        ("zzz", ["'zzz'", "slo-tiers-fleet, or give a .yaml file"]),
        ("nowhere.yaml", ["nowhere.yaml"]),
        ("nowhere.yml", ["nowhere.yml"]),
    ],
)
def test_a_scenario_that_is_not_there_is_refused(name, words):
    with pytest.raises(ConfigError) as caught:
        load_scenario(name)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("load", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_load_is_refused(load):
    with pytest.raises(ConfigError, match="load"):
        scenario().episode(0, load=load)


@pytest.mark.parametrize("num_requests", [0, -3])
def test_an_impossible_number_of_requests_is_refused(num_requests):
    with pytest.raises(ConfigError, match="num_requests"):
        scenario().episode(0, num_requests=num_requests)


# ---- traces ----


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "steady.csv"
    rows = "\n".join(f"{i / 10},1000,100" for i in range(500))
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    return str(path)


def test_with_trace_plays_the_trace_on_the_same_fleet(trace):
    replayed = with_trace(scenario(), trace, rate_rps=4.0)
    assert replayed.name == "tiny + steady.csv"
    assert replayed.fleet == scenario().fleet
    episode = replayed.episode(0)
    assert episode.table.prompt_tokens.tolist() == [1000] * 30
    np.testing.assert_allclose(np.diff(episode.table.arrival_s), 0.25)  # 10 a second, now 4


def test_with_trace_asks_four_fifths_of_what_the_fleet_can_bear(trace):
    tiny = scenario(**fleet(count=1))
    rate = with_trace(tiny, trace).workload.rate_rps
    grid = tiny.spec.types[0].grid
    # a batch of 32 gives 32 tokens a step; a prompt of 1000 fills 1000 / 2048 of a prefill step
    decode_s = grid.step_s([], 32, 32 * 1050) / 32 * 100
    prefill_s = grid.step_s([(2048, 500)]) * 1000 / 2048
    assert rate == pytest.approx(0.8 / (prefill_s + decode_s))


def test_with_trace_rate_grows_with_fleet_and_speed(trace):
    one, three = (with_trace(scenario(**fleet(count=n)), trace) for n in (1, 3))
    fast = with_trace(scenario(**fleet(count=1, speed=2.0)), trace)
    assert three.workload.rate_rps == pytest.approx(3 * one.workload.rate_rps)
    assert fast.workload.rate_rps == pytest.approx(2 * one.workload.rate_rps)


def test_requests_that_no_replica_can_take_are_refused_with_their_counts(trace):
    small = scenario(**fleet(num_blocks=20))  # 320 tokens
    said = r"steady\.csv, line 2: .* exceed 320, .* 500 of 500 requests do, .* 0\.71 of all"
    with pytest.raises(ServeGymError, match=said):
        with_trace(small, trace, rate_rps=1.0)
    written = scenario(**fleet(num_blocks=20), workload={"kind": "trace", "path": trace})
    with pytest.raises(ServeGymError, match=said):
        written.episode(0)


@pytest.mark.parametrize("engine", ["vllm", "vllm-v0", "sglang", "trtllm"])
def test_requests_are_cut_on_request_to_what_each_engine_can_take(trace, engine):
    small = scenario(**fleet(num_blocks=60, engine=engine, max_num_batched_tokens=700))
    small.played_workload
    cut = with_trace(small, trace, rate_rps=1.0, too_long="cut")
    workload = {"kind": "trace", "path": trace, "too_long": "cut", "rate_rps": 1.0}
    written = small.model_copy(update={"workload": cut.workload.model_validate(workload)})
    episodes = [s.episode(0) for s in (cut, written)]
    for episode in episodes:
        episode.validate(small.spec)
    assert episodes[0].table.prompt_tokens.tolist() == episodes[1].table.prompt_tokens.tolist()
    assert cut.played_workload.read().counts()["cut_requests"] == 500


def test_with_trace_cuts_requests_on_request_to_the_largest_replica(trace):
    small = scenario(**fleet(num_blocks=20))  # 320 tokens
    episode = with_trace(small, trace, rate_rps=1.0, too_long="cut").episode(0)
    episode.validate(small.spec)
    assert (episode.table.prompt_tokens + episode.table.output_tokens).max() == 320


def test_a_trace_of_one_request_has_no_rate_to_set(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,1000,100\n")
    with pytest.raises(ServeGymError, match=r"one\.csv cannot be played at rate_rps 4"):
        with_trace(scenario(), str(path), rate_rps=4.0).episode(0)


@pytest.mark.parametrize("load", [0.5, 2.0])
def test_requests_that_all_arrive_at_one_time_are_played_as_a_batch(tmp_path, load):
    path = tmp_path / "batch.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "7,1000,100\n" * 40)
    batch = with_trace(scenario(), str(path))
    assert batch.workload.rate_rps is None
    assert batch.played_workload.is_batch
    assert batch.episode(0, load=load).table.arrival_s.tolist() == [0.0] * 30
    with pytest.raises(ServeGymError, match=r"rate_rps 4: .* arrive at one time; leave rate_rps"):
        with_trace(scenario(), str(path), rate_rps=4.0).episode(0)


@pytest.mark.parametrize(
    "text", ["name: a\nname: b\n", "name: a\nworkload: {kind: generated, rate_rps: 1, rate_rps: 2}"]
)
def test_a_key_given_twice_is_refused_by_line(text):
    with pytest.raises(ConfigError, match=r"x\.yaml, line 2: .*the key '\w+' is given twice"):
        parse_scenario(text, "x.yaml")


@pytest.mark.parametrize("value", ["010", "1:30", "-007", "1:30.5"])
def test_a_number_that_some_read_as_octal_or_as_minutes_is_refused_by_line(value):
    text = f"name: a\nnum_requests: {value}\n"
    with pytest.raises(
        ConfigError, match=rf"x\.yaml, line 2: .*{value} is no plain decimal number"
    ):
        parse_scenario(text, "x.yaml")


def test_plain_numbers_and_merged_keys_are_read_as_ever():
    assert load_yaml("[1, -2, 0, 1_000, 0.5, 1.0e-3, .inf, 0x10]") == [
        *(1, -2, 0, 1000, 0.5, 0.001, float("inf"), 16),
    ]
    assert load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("rate_rps", [None, 5.0])
def test_with_trace_refuses_a_missing_file(rate_rps):
    with pytest.raises(ServeGymError, match=r"nowhere\.csv"):
        with_trace(scenario(), "nowhere.csv", rate_rps).episode(0)


@pytest.mark.parametrize("rate_rps", [0.0, -2.0])
def test_with_trace_refuses_an_impossible_rate(trace, rate_rps):
    with pytest.raises(ServeGymError, match="rate_rps"):
        with_trace(scenario(), trace, rate_rps)


def test_a_changed_copy_forgets_what_was_derived_from_the_original():
    whole = scenario()
    assert whole.spec.block_size != 32
    changed = whole.model_copy(update={"engine": EngineConfig(block_size=32)})
    assert changed.spec.block_size == 32
    assert whole.spec.block_size != 32


@pytest.mark.parametrize("name", scenario_names())
def test_a_scenario_that_is_written_out_whole_is_read_again(name):
    scenario = load_scenario(name)
    assert type(scenario).model_validate(scenario.model_dump(mode="json")) == scenario
