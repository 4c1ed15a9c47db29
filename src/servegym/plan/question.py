"""What a plan is asked for: a model, limits, and the GPUs there are to choose from."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from servegym.costs.formats import ScenarioFormat
from servegym.errors import ConfigError
from servegym.scenario.config import Config, Count
from servegym.scenario.fleet import EngineConfig

#: From the simplest on: of rules that do equally well the first is named.
DEFAULT_RULES = ("round-robin", "least-outstanding", "prefix-load", "class-aware")


class Question(Config):
    """What is to be served within which limits, and what fleets may be made of.

    Attributes:
        model: Name in `assets/models.yaml`.
        precision: Of weights and GEMMs.
        engine: Settings of every replica.
        ttft_s: Limit of the time to the first token.
        tpot_s: Limit of the time per output token.
        attainment: Share of the requests that must keep both.
        gpus: Names in `assets/gpus.yaml`.
        degrees: Tensor-parallel degrees.
        stages: Pipeline-parallel degrees: stages of as many GPUs on one node.
        drafts: Tokens to draft for what decodes, 0: none.
        acceptance: How often a draft is accepted where the one before it is; if any are to be
            drafted.
        rules: Dispatch rules, the simplest first.
        max_usd_per_h: What a fleet may cost.
        max_replicas: Largest number of replicas.
        mixed: Whether a fleet may have two kinds of replicas.
        num_worlds: Worlds in which answers are asked again, with other kernels; 0: in none.
    """

    model: str = "Llama-3.1-8B"
    precision: ScenarioFormat = "bf16"
    engine: EngineConfig = EngineConfig()
    ttft_s: float = Field(0.5, gt=0)
    tpot_s: float = Field(0.04, gt=0)
    attainment: float = Field(0.99, gt=0, le=1)
    gpus: tuple[str, ...] = Field(min_length=1)
    degrees: tuple[Count, ...] = Field((1, 2, 4, 8), min_length=1)
    stages: tuple[Count, ...] = Field((1,), min_length=1)
    drafts: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    acceptance: float | None = Field(None, gt=0, le=1)
    rules: tuple[str, ...] = Field(DEFAULT_RULES, min_length=1)
    max_usd_per_h: float | None = Field(None, gt=0)
    max_replicas: int = Field(64, ge=1)
    mixed: bool = True
    num_worlds: int = Field(20, ge=0)

    @model_validator(mode="after")
    def _check_once(self) -> Question:
        for name in ("gpus", "degrees", "stages", "drafts", "rules"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(
                    f"{name} must be given once each, got {', '.join(map(str, given))}"
                )
        return self

    @model_validator(mode="after")
    def _check_acceptance(self) -> Question:
        if any(self.drafts) == (self.acceptance is None):
            raise ValueError(
                "drafts and acceptance go together: say how often a draft is accepted, which "
                f"vLLM's log tells, got drafts {', '.join(map(str, self.drafts))} and acceptance "
                f"{self.acceptance}"
            )
        return self

    def allowed_late(self, num_requests: int) -> int:
        """Requests of so many that may miss a limit."""
        return math.floor((1.0 - self.attainment) * num_requests + 1e-9)


def read_limits(text: str) -> tuple[float, float]:
    """Read `ttft=0.5,tpot=0.04`: limits of TTFT and TPOT in seconds.

    Raises:
        ConfigError: If it says something else.
    """
    form = "limits are written ttft=0.5,tpot=0.04, in seconds above 0"
    found: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if key not in ("ttft", "tpot") or key in found or not 0 < limit < math.inf:
            raise ConfigError(f"{form}, got {text!r}")
        found[key] = limit
    if len(found) < 2:
        raise ConfigError(f"{form}, each once, got {text!r}")
    return found["ttft"], found["tpot"]
