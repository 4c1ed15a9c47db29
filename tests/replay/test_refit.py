"""Costs written by a replay are those that the fleet has, for simulator and router."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from servegym.calibrate.calibration import cost_from, read_calibration
from servegym.calibrate.correction import Correction
from servegym.errors import ConfigError
from servegym.replay.drift import Effect, Stretch
from servegym.replay.fleet import rates_grid, router_fleet, scenario_fleet
from servegym.replay.forced import Factors
from servegym.replay.log import read_log
from servegym.replay.refit import correction, held_out, write_refit
from servegym.replay.terms import scaled
from servegym.scenario import load_scenario, parse_scenario
from servegym.serve.facts import Rates
from servegym.serve.router.config import parse_config, read_config

from .live import NAMES, SCENARIO, scenario
from .reading import load

STEPS = [([], 1, 500), ([], 30, 30_000), ([(1500, 0)], 0, 0), ([(400, 900)], 10, 9_000)]


def stretch(step, kv, prefill):
    def effect(value):
        return Effect(value, value, value, drifted=True, known=True)

    terms = {"step": step, "kv": kv, "prefill": prefill, "request": 0.0}
    made = {name: effect(value) for name, value in terms.items()}
    return Stretch(0, 0.0, 1.0, 100, effect(step), made, 0.0, 8.0, 4000.0)


def router(**hardware):
    settings = {"model": "Llama-3.1-8B", **hardware}
    return parse_config(
        {
            "replicas": [
                {
                    "name": name,
                    "url": f"http://localhost:{8000 + i}",
                    "hardware": {"gpu": "L40S" if i == 2 else "A100-SXM-80GB", **settings},
                }
                for i, name in enumerate(NAMES)
            ],
            "dispatch": {"slo_classes": [{"name": "chat"}, {"name": "batch"}]},
        },
        "router.yaml",
    )


def assert_same(grid, other, rel):
    for step in STEPS:
        assert grid.step_s(*step) == pytest.approx(other.step_s(*step), rel=rel)


def test_a_correction_file_scales_the_grid_as_the_replay_did(tmp_path):
    fleet = scenario_fleet(scenario())
    path = tmp_path / "c.json"
    correction(fleet, 1, stretch(1.3, 1.6, 0.8)).write(path)
    made = cost_from(path).compile(max_tokens=2048)
    assert_same(made, scaled(fleet.types[1].grid, 1.3, 1.6, 0.8), rel=0.01)


def test_a_correction_of_a_correction_has_both(tmp_path):
    path = tmp_path / "c.json"
    correction(scenario_fleet(scenario()), 2, stretch(1.2, 1.0, 0.9)).write(path)
    text = SCENARIO.replace("{gpu: L40S}", f"{{gpu: L40S, calibration: {path}}}")
    again = scenario_fleet(parse_scenario(text, "x"))
    content = correction(again, 2, stretch(1.5, 2.0, 1.0)).content
    assert isinstance(content, Correction)
    assert (content.step, content.kv, content.prefill) == (1.8, 2.0, 0.9)
    assert content.base is None


def test_fp8_costs_are_corrected_as_fp8(tmp_path):
    text = SCENARIO.replace("fleet:", "precision: fp8\nfleet:").replace("A100-SXM-80GB", "L40S")
    fleet = scenario_fleet(parse_scenario(text, "x"))
    path = tmp_path / "c.json"
    correction(fleet, 0, stretch(2.0, 2.0, 2.0)).write(path)
    assert read_calibration(path).precision == "fp8"
    made = cost_from(path).compile(max_tokens=2048)
    assert_same(made, scaled(fleet.types[0].grid, 2.0, 2.0, 2.0), rel=0.01)
    wrong = SCENARIO.replace("{gpu: L40S}", f"{{gpu: L40S, calibration: {path}}}")
    with pytest.raises(ConfigError, match="precision fp8, not for bf16"):
        _ = parse_scenario(wrong, "x").spec


def test_a_refitted_scenario_predicts_the_log_it_was_fitted_to(slowed, slowed_drift, tmp_path):
    log, _, _ = load(slowed)
    files = write_refit(log, slowed_drift, tmp_path)
    assert [path.name for path in files] == ["calibration-a100-1.json", "scenario.yaml"]
    refitted = read_log([slowed], scenario_fleet(load_scenario(files[-1])))
    assert [t.num_blocks for t in refitted.fleet.types] == [t.num_blocks for t in log.fleet.types]
    grid = refitted.fleet.types[1].grid
    assert grid.step_s([], 8, 4000) == pytest.approx(
        1.3 * log.fleet.types[1].grid.step_s([], 8, 4000), rel=0.03
    )
    for r in (0, 2):
        assert_same(refitted.fleet.types[r].grid, log.fleet.types[r].grid, rel=1e-9)


def test_a_refitted_router_configuration_loads(slowed, slowed_drift, tmp_path):
    log = read_log([slowed], router_fleet(router()))
    [*calibrations, path] = write_refit(log, slowed_drift, tmp_path)
    fleet = router_fleet(read_config(path))
    assert len(calibrations) == 1
    ratio = fleet.types[1].grid.step_s([], 8, 4000) / log.fleet.types[1].grid.step_s([], 8, 4000)
    assert ratio == pytest.approx(1.3, rel=0.03)


def test_rates_are_rewritten_as_their_grid_is_scaled(slowed, slowed_drift, tmp_path):
    rates = {
        "prefill_tokens_per_s": 15000.0,
        "decode_step_s": 0.012,
        "decode_seq_s": 0.0003,
        "kv_capacity_tokens": 300_000,
    }
    config = parse_config(
        {
            "replicas": [
                {"name": name, "url": f"http://localhost:{8000 + i}", "rates": rates}
                for i, name in enumerate(NAMES)
            ],
            "dispatch": {"slo_classes": [{"name": "chat"}, {"name": "batch"}]},
        },
        "router.yaml",
    )
    log = read_log([slowed], router_fleet(config))
    [path] = write_refit(log, slowed_drift, tmp_path)
    written = yaml.safe_load(path.read_text())["replicas"]
    assert written[0]["rates"] == rates
    now = slowed_drift.replicas[1].now
    factors = [now.terms[term].value for term in ("step", "kv", "prefill")]
    assert_same(
        rates_grid(Rates(**written[1]["rates"])),
        scaled(rates_grid(Rates(**rates)), *factors),
        rel=2e-3,
    )


def test_nothing_is_written_where_nothing_has_drifted(noisy, noisy_drift, tmp_path):
    log, _, _ = load(noisy)
    with pytest.raises(ConfigError, match="nothing to refit"):
        write_refit(log, noisy_drift, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_fitted_on_the_earlier_part_predicts_the_later(slowed):
    log, forced, observed = load(slowed)
    result = held_out(log, forced, observed, 0.03)

    def error(figures):
        return next(
            abs(f.error)
            for f in figures
            if (f.name, f.metric, f.statistic) == ("a100-1", "e2e_s", "mean")
        )

    assert error(result.before) > 0.15
    assert error(result.after) < 0.03


def test_a_fit_does_not_see_the_later_part(slowed):
    log, forced, observed = load(slowed)
    known = observed.ended_by(50.0)
    [expected] = forced.play([Factors.ones(3)])
    assert (known.at_s + known.e2e_s)[known.usable].max() <= 50.0
    assert not known.usable[observed.at_s >= 50.0].any()
    assert np.isfinite(expected.e2e_s).all()
    assert len(log) == len(forced)


def test_a_short_log_cannot_be_tested_on(tmp_path, exact):
    path = tmp_path / "requests-1.jsonl"
    lines = next(iter(sorted(exact.iterdir()))).read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:40]))
    log, forced, observed = load(path)
    with pytest.raises(ConfigError, match="too short"):
        held_out(log, forced, observed, 0.03)
