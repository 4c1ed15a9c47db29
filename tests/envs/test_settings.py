from __future__ import annotations

import dataclasses

import pytest

from servegym.envs.dispatch_batch import DispatchBatch
from servegym.envs.settings import DispatchSettings, WorkflowSettings, make_settings
from servegym.errors import ConfigError, UnknownSetting


def test_settings_are_the_defaults_but_for_those_given():
    made = make_settings(WorkflowSettings, "agentic-mix", {"max_stages": 3, "load": (0.5, 1.0)})
    assert made == WorkflowSettings(scenario="agentic-mix", max_stages=3, load=(0.5, 1.0))
    assert made.shortlist == "work-left"
    assert make_settings(WorkflowSettings, None, {}).scenario == "random-dags"


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DispatchSettings().warmup = 3  # type: ignore[misc]


def test_a_setting_of_another_problem_is_unknown():
    with pytest.raises(UnknownSetting, match="unknown setting 'max_stages'"):
        make_settings(DispatchSettings, None, {"max_stages": 3})


@pytest.mark.parametrize(
    ("settings_type", "given", "sentence"),
    [
        (DispatchSettings, {"group_size": 0}, "group_size must be at least 1, got 0"),
        (
            DispatchSettings,
            {"features": "raw"},
            "features must be one of contract, extended, costs",
        ),
        (WorkflowSettings, {"max_edges": 0}, "max_edges must be at least 1, got 0"),
        (WorkflowSettings, {"episode_end": "never"}, "episode_end must be one of drained"),
    ],
)
def test_values_are_refused_before_a_scenario_is_loaded(settings_type, given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_settings(settings_type, "no-such-scenario", given)


def test_a_batch_keeps_what_it_was_told(make_scenario):
    settings = DispatchSettings(scenario=make_scenario(), r_max=4, reward_scale=2.5)
    batch = DispatchBatch(2, settings)
    assert batch.settings is settings
    assert (batch.width, batch.reward_scale) == (4, 2.5)
