"""Settings of the vLLM plug-in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from servegym.documents import checked
from servegym.errors import ConfigError
from servegym.policy.ordering import NO_LIMIT_S
from servegym.serve.guards import BreakerConfig

#: Key in vLLM's `--additional-config`.
KEY = "servegym"
#: Environment variable with the same JSON object, for launchers that do not pass the option on.
VARIABLE = "SERVEGYM_VLLM"


class PluginConfig(BaseModel):
    """What `{"servegym": {...}}` in `--additional-config` may hold.

    Attributes:
        policy: An order by name (`"srpt"`, `"ltr:starvation=200"`) or the path of a learned one.
        shadow: Ask the policy and count how often the engine does the same, but change nothing.
        fallback: Order when the policy fails: by arrival, or by the client's priority.
        predict: What to take for a request whose client predicts no output length: the moving
            average of the ended ones, or its `max_tokens`.
        ttft_slo_s: TTFT limit of requests that bring none.
        e2e_slo_s: E2E limit of requests that bring none.
        max_scored_waiting: Of a longer queue a policy without memory scores only newcomers, the
            best so far and, in turn, a part of the rest, as many in all.
        breaker: When a failing policy is taken out of service.
        step_log: CSV file of steps, for `servegym calibrate engine`.
        stats_file: JSON file with counts and overhead, renewed at each report.
        report_every_s: Time between reports.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    policy: str = "fcfs"
    shadow: bool = False
    fallback: Literal["fcfs", "priority"] = "fcfs"
    predict: Literal["mean", "max_tokens"] = "mean"
    ttft_slo_s: float = Field(NO_LIMIT_S, gt=0)
    e2e_slo_s: float = Field(NO_LIMIT_S, gt=0)
    max_scored_waiting: int = Field(512, ge=2)
    breaker: BreakerConfig = BreakerConfig()
    step_log: Path | None = None
    stats_file: Path | None = None
    report_every_s: float = Field(60.0, gt=0)


def read_config(additional: object, environment: Mapping[str, str] = os.environ) -> PluginConfig:
    """Read the settings from vLLM's additional config, or else from the environment.

    Raises:
        ConfigError: If there are none, or one is not allowed.
    """
    given: object = additional.get(KEY) if isinstance(additional, Mapping) else None
    where = "--additional-config"
    if given is None and VARIABLE in environment:
        where = VARIABLE
        try:
            given = json.loads(environment[VARIABLE])
        except json.JSONDecodeError as error:
            raise ConfigError(f"{VARIABLE} must be a JSON object: {error}") from error
    if not isinstance(given, Mapping):
        raise ConfigError(
            "tell servegym's scheduler which policy to follow: "
            """--additional-config '{"servegym": {"policy": "srpt"}}'"""
        )
    return checked(dict(given), f"{where}, {KEY}", PluginConfig)
