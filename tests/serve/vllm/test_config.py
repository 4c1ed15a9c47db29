"""Settings of the plug-in, from vLLM's additional config or the environment."""

from __future__ import annotations

import pytest

from servegym.errors import ConfigError
from servegym.serve.vllm.config import VARIABLE, read_config


def test_settings_come_from_the_additional_config():
    config = read_config({"servegym": {"policy": "srpt", "shadow": True}, "other": 1}, {})
    assert config.policy == "srpt"
    assert config.shadow


def test_settings_come_from_the_environment_if_there_are_none():
    environment = {VARIABLE: '{"policy": "sjf"}'}
    assert read_config({}, environment).policy == "sjf"
    assert read_config({"servegym": {"policy": "edf"}}, environment).policy == "edf"


@pytest.mark.parametrize(
    ("additional", "environment", "message"),
    [
        ({}, {}, "tell servegym's scheduler which policy"),
        (None, {}, "tell servegym's scheduler which policy"),
        ({"servegym": "srpt"}, {}, "tell servegym's scheduler which policy"),
        ({}, {VARIABLE: "{"}, "SERVEGYM_VLLM must be a JSON object"),
        ({}, {VARIABLE: "[]"}, "tell servegym's scheduler which policy"),
        ({"servegym": {"polcy": "srpt"}}, {}, "servegym: unknown key polcy; did you mean policy"),
        ({"servegym": {"fallback": "sjf"}}, {}, "servegym: fallback: .*'fcfs' or 'priority'"),
        ({"servegym": {"breaker": {"cooldown_s": 0}}}, {}, r"servegym: breaker\.cooldown_s"),
        ({"servegym": {"ttft_slo_s": -1}}, {}, "servegym: ttft_slo_s: .*greater than 0, got -1"),
    ],
)
def test_wrong_settings_get_one_sentence(additional, environment, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(additional, environment)
    assert "\n" not in str(caught.value)
