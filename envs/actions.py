"""Actions as they are given, and spaces that draw from what is allowed now."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from gymnasium import spaces

from servegym.errors import InvalidAction
from servegym.typing import Int8Array, IntArray


class Masked(Protocol):
    """What knows which actions are allowed."""

    num_envs: int
    num_actions: int
    mask: Int8Array


def as_integers(actions: Any, num_envs: int) -> IntArray:
    """Return actions as `int64[num_envs]`, contiguous; whole numbers may come as floats.

    Raises:
        InvalidAction: If there is not one whole number for each environment.
    """
    given = np.asarray(actions)
    if given.shape != (num_envs,):
        raise InvalidAction(
            f"there must be one action for each of {num_envs} environments, got shape {given.shape}"
        )
    if given.dtype.kind == "f":
        # a NaN is not equal to itself, and an infinity not to any int64
        with np.errstate(invalid="ignore"):
            whole = given.astype(np.int64)
        odd = np.flatnonzero(whole != given)
        if len(odd):
            raise InvalidAction(
                f"action {given[odd[0]]} of environment {odd[0]} is not a whole number: "
                f"give an index of the action space"
            )
        return whole
    if given.dtype.kind not in "iu":
        raise InvalidAction(f"actions must be whole numbers, got {given.dtype} {given.tolist()!r}")
    return np.ascontiguousarray(given, np.int64)


class AllowedAction(spaces.Discrete):
    """The actions of a batch of one; draws from what is allowed now, unless given a mask itself.

    A pickled or copied space is a plain `Discrete`: it stands for no environment.
    """

    def __init__(self, batch: Masked) -> None:
        super().__init__(batch.num_actions)
        self._batch = batch

    def sample(self, mask: Any = None, probability: Any = None) -> np.int64:
        """Draw an action that is allowed now."""
        if mask is None and probability is None:
            mask = self._batch.mask[0]
        return super().sample(mask, probability)

    def __reduce__(self) -> tuple[Any, ...]:
        return spaces.Discrete, (int(self.n),), _state(self)


class AllowedActions(spaces.MultiDiscrete):
    """The actions of a batch; draws from what is allowed now, unless given a mask itself.

    A pickled or copied space is a plain `MultiDiscrete`: it stands for no environments.
    """

    def __init__(self, batch: Masked) -> None:
        super().__init__([batch.num_actions] * batch.num_envs)
        self._batch = batch

    def sample(self, mask: Any = None, probability: Any = None) -> Any:
        """Draw an action for each environment, `int64[num_envs]`."""
        if mask is not None or probability is not None:
            return super().sample(mask, probability)
        allowed = self._batch.mask
        return (self.np_random.random(allowed.shape) * allowed).argmax(-1)

    def __reduce__(self) -> tuple[Any, ...]:
        return spaces.MultiDiscrete, (self.nvec,), _state(self)


def _state(space: spaces.Space[Any]) -> dict[str, Any]:
    return {name: value for name, value in vars(space).items() if name != "_batch"}


def rebind(space: spaces.Space[Any], batch: Masked) -> spaces.Space[Any]:
    """Return what `space`, a plain copy, was before it was copied, for the copied batch."""
    bound = (AllowedAction if isinstance(space, spaces.Discrete) else AllowedActions)(batch)
    bound.__dict__.update(_state(space))
    return bound
