"""Shape of a dispatcher's network; without PyTorch, for those who only read settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from tyro.conf import Fixed, Suppress

from servegym.baselines.registry import policy
from servegym.documents import one_sentence
from servegym.errors import ConfigError
from servegym.policy.costs import BASES, HELD_BASES, INFERRED_BASES


class NetworkConfig(BaseModel):
    """Shape of the network and the heuristic it corrects."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: int = Field(32, ge=4)
    """Units of a layer."""
    extended: bool = False
    """See what a router infers, too: step times, lengths learnt from requests that have ended, and
    whom a choice pushes over its limits. A decision then takes longer."""
    arrivals: bool = False
    """With --extended: see how much of the fleet's work is arriving, too. What a rejection is worth
    depends on it."""
    context: Literal["mean", "attention"] = "mean"
    """How replicas see each other."""
    base: str = "added-delay"
    """Rule the policy starts from, with its parameters: added-delay, prefix-load, speed-family,
    least-outstanding or, with --extended, added-delay-inferred; a search may begin as
    added-delay-held, too."""
    base_params: Annotated[tuple[float, ...], Fixed, Suppress] = ()
    """The rule's parameters, where `base` is its name alone; none: its defaults."""
    eta: float = Field(10.0, gt=0)
    """Weight of the rule's cost in the logits."""
    relative: bool = False
    """Let the rule's cost count by its logarithm: a replica that costs a tenth more is as much
    worse where requests take a second as where they take a minute, so that one network can serve
    both."""
    num_extra: Annotated[int, Fixed, Suppress] = Field(0, ge=0, le=2)
    """Actions besides the replicas, hold and reject; training takes the scenario's."""

    @property
    def holds(self) -> bool:
        """Whether the rule holds requests, so that the network decides about that, too."""
        return self.base in HELD_BASES

    @model_validator(mode="wrap")
    @classmethod
    def _read_base(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, dict):
            text = str(data.get("base", "added-delay"))
            rule, name = policy(text), text.partition(":")[0]
            if name not in BASES:
                raise ConfigError(f"base must be one of {', '.join(BASES)}, got {text!r}")
            if name in INFERRED_BASES and not data.get("extended"):
                raise ConfigError(f"base {name} goes by what a router infers: give --extended")
            if data.get("arrivals") and not data.get("extended"):
                raise ConfigError(
                    "arrivals is for networks that see what a router infers: give --extended, too"
                )
            if ":" in text or not data.get("base_params"):
                data = {**data, "base": name, "base_params": tuple(rule.params.tolist())}
        try:
            return handler(data)
        except ValidationError as error:
            raise ConfigError(one_sentence(error, data, cls)) from error
