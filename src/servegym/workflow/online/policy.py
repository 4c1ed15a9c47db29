"""Online policies: compiled rules, and the protocol that all others follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numba import typeof, types

from servegym.cluster.jit import OPTIONS, compiled
from servegym.typing import FloatArray, IntArray, UInt64Array
from servegym.workflow.online.allocate import Capacity, make_params, make_state
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, FleetSpec
from servegym.workflow.online.view import View, look

Information = Literal["blind", "metric", "predictive", "oracle"]


def _example() -> View:
    """Make a view of the types that the simulator hands to rules."""
    spec = FleetSpec((DeviceType("any"),))
    return look(make_params(spec), make_state(spec, Capacity(1, 1, 1, 1, 1, 1)), 0)


#: `decide(view, params[p], memory[m], stage_memory[N, a], device_memory[D, b], rng[1]) -> action`.
SIGNATURE = types.int64(
    *map(typeof, (_example(),)),
    types.float64[::1],
    types.float64[::1],
    types.float64[:, ::1],
    types.float64[:, ::1],
    types.uint64[::1],
)

Decide = Callable[[View, FloatArray, FloatArray, FloatArray, FloatArray, UInt64Array], int]


def rule(function: Callable[..., int]) -> Decide:
    """Compile an online rule with the signature every rule shares (cached on disk).

    The rule answers with `stage * num_devices + device`, which must be able to start
    (`view.can_start`), or with `state.WAIT`, which is refused if nothing is running or to come.
    """
    made: Decide = compiled(function, SIGNATURE, **OPTIONS)
    return made


@runtime_checkable
class WorkflowPolicy(Protocol):
    """Chooses which ready stage starts where, or waits."""

    @property
    def name(self) -> str:
        """Name of the policy in tables."""
        ...

    @property
    def information(self) -> Information:
        """What it may know; printed with every result. An oracle is shown the truth."""
        ...

    @property
    def asks_when_ready(self) -> bool:
        """Whether it also wants a decision when a stage became ready that cannot start yet."""
        ...

    def reset(self, simulator: Simulator, seed: int) -> None:
        """Forget everything and prepare for the episodes that are loaded."""
        ...

    def act(self, simulator: Simulator, envs: IntArray) -> IntArray:
        """Decide for the environments in `envs`, which wait for a decision.

        Returns:
            Actions as `Simulator.apply` takes them, `int64[len(envs)]`.
        """
        ...


@dataclass
class Rule:
    """A policy given as a compiled function; runs inside the simulator's loop or from Python.

    Attributes:
        name: Name in tables.
        information: Information class.
        decide: The function, compiled by `rule`.
        params: Its tunable numbers, `float64[p]`.
        param_names: Their names.
        asks_when_ready: Whether it commits stages to devices as soon as they are ready.
        memory_size: How many float64 it keeps (zeroed at reset).
        stage_columns: How many of each stage, `stage_memory[N, stage_columns]`.
        device_columns: How many of each device, `device_memory[D, device_columns]`.
        reference: Where the rule comes from.
    """

    name: str
    information: Information
    decide: Decide
    params: FloatArray = field(default_factory=lambda: np.zeros(0))
    param_names: tuple[str, ...] = ()
    asks_when_ready: bool = False
    memory_size: int = 0
    stage_columns: int = 0
    device_columns: int = 0
    reference: str = ""
    memory: FloatArray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    stage_memory: FloatArray = field(default_factory=lambda: np.zeros((0, 0, 0)), repr=False)
    device_memory: FloatArray = field(default_factory=lambda: np.zeros((0, 0, 0)), repr=False)
    rng: UInt64Array = field(default_factory=lambda: np.zeros((0, 1), np.uint64), repr=False)

    def reset(self, simulator: Simulator, seed: int) -> None:
        """Zero the memory and seed one random stream per environment."""
        e = simulator.num_envs
        self.memory = np.zeros((e, self.memory_size))
        stages, devices = simulator.state.stage.shape[1], simulator.state.device.shape[1]
        self.stage_memory = np.zeros((e, stages, self.stage_columns))
        self.device_memory = np.zeros((e, devices, self.device_columns))
        streams = np.random.SeedSequence(seed).generate_state(e, np.uint64)
        self.rng = streams.reshape(e, 1).astype(np.uint64)

    def act(self, simulator: Simulator, envs: IntArray) -> IntArray:
        """Apply the rule to one environment after the other."""
        actions = np.empty(len(envs), np.int64)
        for row, env in enumerate(envs.tolist()):
            actions[row] = self.decide(
                simulator.view(env),
                self.params,
                self.memory[env],
                self.stage_memory[env],
                self.device_memory[env],
                self.rng[env],
            )
        return actions
