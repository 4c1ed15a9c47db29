"""Fields read as engines read them: as pydantic does where it is lax.

So `16.0`, `"16"` and `"true"` are numbers and truth values to them; they are to the router too.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from servegym.serve.router.errors import RequestError

_T = TypeVar("_T")


def read_lax(kind: TypeAdapter[_T], value: object, message: str) -> _T:
    """Return a value as it is read.

    Raises:
        RequestError: If it cannot be; with that message.
    """
    try:
        return kind.validate_python(value)
    except ValidationError:
        raise RequestError(400, message, "invalid_request") from None
