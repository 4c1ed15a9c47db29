"""What is read from scenario files: checked once, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0)]
_T = TypeVar("_T")


class Config(BaseModel):
    """What is read from a scenario file: checked, and not to be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy with some fields replaced, without what was derived from those of the original."""
        made = super().model_copy(update=update, deep=deep)
        for name in set(made.__dict__) - set(type(made).model_fields):
            del made.__dict__[name]
        return made


def ascending(value: _T) -> _T:
    """Refuse a pair that is no range."""
    if isinstance(value, tuple) and value[0] > value[1]:
        raise ValueError("a range must go from low to high")
    return value
