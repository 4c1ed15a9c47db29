"""Shape of a job scheduler's network; without PyTorch, for those who only read settings."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from tyro.conf import Fixed, Suppress

from servegym.agents.workflow_policy import BASES, MAX_HIDDEN
from servegym.documents import one_sentence
from servegym.errors import ConfigError


class WorkflowNetworkConfig(BaseModel):
    """Shape of the network and the rule it corrects."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = "none"
    """Rule the policy starts from: none, srpt-cp, sjf-cp, edd or rank."""
    eta: float = Field(5.0, ge=0)
    """Weight of the rule's score."""
    hidden: int = Field(32, ge=1, le=MAX_HIDDEN)
    """Units of a layer."""
    message_passing: bool = True
    """Whether stages see those behind them in their job."""
    tau_s: Annotated[float, Fixed, Suppress] = Field(1.0, gt=0)
    """Mean duration of a stage, the unit of all times; training measures it."""

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        base = data.get("base", "none") if isinstance(data, dict) else "none"
        if base not in BASES:
            raise ConfigError(f"base must be one of {', '.join(BASES)}, got {base!r}")
        try:
            return handler(data)
        except ValidationError as error:
            raise ConfigError(one_sentence(error, data, cls)) from error
