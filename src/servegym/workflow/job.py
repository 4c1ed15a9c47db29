"""A job: a DAG of stages, each a task, an LLM request or a call of a tool."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from servegym.typing import BoolArray, FloatArray, IntArray
from servegym.workflow.graph import WorkflowError


class StageKind(IntEnum):
    """What a stage is, and so what it needs to run."""

    TASK = 0  # a device for as long as `duration_s` says
    LLM = 1  # a place in the batch of an engine, for its prompt and its output
    TOOL = 2  # no device: runs at once when its parents have ended


@dataclass(frozen=True)
class Job:
    """One workflow as it will turn out, with what a scheduler may know of it.

    The truth (`output_tokens`, `tool_s`, `hidden` stages) is for the simulator and for oracles;
    a scheduler sees the expected values, and a hidden stage only once all its parents have ended
    (the third retry of a query is not known before the second has failed).

    Attributes:
        template: What kind of job it is, e.g. `text-to-sql`.
        label: Which step of the template each stage is, `int64[S]`: equal labels are alike, and
            statistics by (template, label) are what a scheduler can learn beforehand.
        kind: `StageKind` of each stage, `int64[S]`.
        duration_s: Of tasks on each device type, `float64[S, T]`; inf where it cannot run; rows of
            other kinds are 0.
        tool_s: True durations of tool calls, `float64[S]`; 0 for other kinds.
        expected_tool_s: What is known of them beforehand, `float64[S]`.
        prompt_tokens: Of LLM requests, `int64[S]`, what is shared with parents included; else 0.
        output_tokens: True output lengths, `int64[S]`; 0 for other kinds.
        expected_output_tokens: What is predicted, `float64[S]`.
        parent: Of each edge, `int64[E]`.
        child: Of each edge, `int64[E]`.
        data_bytes: To be moved where parent and child run on two devices, `float64[E]`.
        shared_tokens: Leading prompt tokens of the child that are the parent's prompt or output,
            and need no prefill where the parent's KV blocks are still on the device, `int64[E]`.
        hidden: Stages that are not known before their parents have ended, `bool[S]`.
        deadline_s: After the arrival; inf for none.
        weight: Worth of the job.
    """

    template: str
    label: IntArray
    kind: IntArray
    duration_s: FloatArray
    tool_s: FloatArray
    expected_tool_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    expected_output_tokens: FloatArray
    parent: IntArray
    child: IntArray
    data_bytes: FloatArray
    shared_tokens: IntArray
    hidden: BoolArray
    deadline_s: float = math.inf
    weight: float = 1.0

    @property
    def num_stages(self) -> int:
        """Stages of the job."""
        return len(self.kind)

    @property
    def num_edges(self) -> int:
        """Edges between stages."""
        return len(self.parent)


@dataclass
class JobBuilder:
    """Puts a job together stage by stage; parents are added before their children.

    Attributes:
        template: Name of the kind of job.
        device_types: Names of the columns of `duration_s`.
    """

    template: str
    device_types: tuple[str, ...] = ()
    _stages: list[tuple[int, StageKind, tuple[float, ...], float, float, int, int, float, bool]] = (
        field(default_factory=list)
    )
    _edges: list[tuple[int, int, float, int]] = field(default_factory=list)

    def task(self, label: int, duration_s: dict[str, float], *, hidden: bool = False) -> int:
        """Add a task by its duration on each device type; returns its number."""
        row = tuple(duration_s.get(name, math.inf) for name in self.device_types)
        return self._add(label, StageKind.TASK, row, hidden=hidden)

    def llm(
        self,
        label: int,
        prompt_tokens: int,
        output_tokens: int,
        expected_output_tokens: float | None = None,
        *,
        hidden: bool = False,
    ) -> int:
        """Add an LLM request; returns its number."""
        expected = output_tokens if expected_output_tokens is None else expected_output_tokens
        return self._add(
            label,
            StageKind.LLM,
            prompt=prompt_tokens,
            output=output_tokens,
            expected_output=expected,
            hidden=hidden,
        )

    def tool(
        self, label: int, tool_s: float, expected_s: float | None = None, *, hidden: bool = False
    ) -> int:
        """Add a tool call; returns its number."""
        expected = tool_s if expected_s is None else expected_s
        return self._add(label, StageKind.TOOL, tool_s=tool_s, expected_s=expected, hidden=hidden)

    def edge(
        self, parent: int, child: int, *, data_bytes: float = 0.0, shared_tokens: int = 0
    ) -> None:
        """Let `child` wait for `parent`."""
        self._edges.append((parent, child, data_bytes, shared_tokens))

    def build(self, deadline_s: float = math.inf, weight: float = 1.0) -> Job:
        """Check and finish the job.

        Raises:
            WorkflowError: If it has no stages, an edge leads back, or a number is out of range.
        """
        if not self._stages:
            raise WorkflowError(f"a job of {self.template} needs at least one stage, got none")
        count = len(self._stages)
        edges = sorted(self._edges)
        for parent, child, size, shared in edges:
            if not 0 <= parent < child < count:
                raise WorkflowError(
                    f"an edge of {self.template} leads from stage {parent} to {child}: parents"
                    f" come first, and there are {count} stages"
                )
            if not (size >= 0 and 0 <= shared <= self._stages[child][5]):
                raise WorkflowError(
                    f"the edge from stage {parent} to {child} of {self.template} carries"
                    f" {size:g} bytes and {shared} tokens of the child's prompt of"
                    f" {self._stages[child][5]}: neither may be negative, nor more than there is"
                )
        label, kind, rows, tool_s, expected_s, prompt, output, expected, hidden = zip(
            *self._stages, strict=True
        )
        types = len(self.device_types)
        ends = np.array([edge[:2] for edge in edges], np.int64).reshape(-1, 2)
        return Job(
            template=self.template,
            label=np.array(label, np.int64),
            kind=np.array(kind, np.int64),
            duration_s=np.array([row or (0.0,) * types for row in rows], float).reshape(
                count, types
            ),
            tool_s=np.array(tool_s, float),
            expected_tool_s=np.array(expected_s, float),
            prompt_tokens=np.array(prompt, np.int64),
            output_tokens=np.array(output, np.int64),
            expected_output_tokens=np.array(expected, float),
            parent=np.ascontiguousarray(ends[:, 0]),
            child=np.ascontiguousarray(ends[:, 1]),
            data_bytes=np.array([edge[2] for edge in edges], float),
            shared_tokens=np.array([edge[3] for edge in edges], np.int64),
            hidden=np.array(hidden, np.bool_),
            deadline_s=deadline_s,
            weight=weight,
        )

    def _add(
        self,
        label: int,
        kind: StageKind,
        row: tuple[float, ...] = (),
        *,
        tool_s: float = 0.0,
        expected_s: float = 0.0,
        prompt: int = 0,
        output: int = 0,
        expected_output: float = 0.0,
        hidden: bool = False,
    ) -> int:
        number = len(self._stages)
        where = f"stage {number} of {self.template}"
        if kind == StageKind.TASK and not any(0 <= x < math.inf for x in row):
            raise WorkflowError(f"{where} can run on none of {', '.join(self.device_types)}")
        if kind == StageKind.LLM and (prompt < 1 or output < 1 or expected_output < 1):
            raise WorkflowError(
                f"{where} must have a prompt and an output of at least one token each, got"
                f" {prompt} and {output} (expected {expected_output:g})"
            )
        if not (0 <= tool_s < math.inf and 0 <= expected_s < math.inf):
            raise WorkflowError(f"{where} must take at least 0 s, got {tool_s:g} ({expected_s:g})")
        self._stages.append(
            (label, kind, row, tool_s, expected_s, prompt, output, float(expected_output), hidden)
        )
        return number
