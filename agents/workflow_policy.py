"""A learned scheduler of jobs as a compiled rule: the simulator's loop runs it like any other.

Each pair of a ready stage and a device that it could start on has a score: that of a base rule,
plus a linear function of its features, plus a network's correction. Waiting has the score 0. The
greatest score wins. Embeddings of stages by message passing are made once, when a job arrives or
a hidden stage shows: what they say of a stage never changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from servegym.agents.workflow_features import (
    NUM_DEVICE_COLUMNS,
    NUM_PAIR_FEATURES,
    NUM_STAGE_FEATURES,
    describe_devices,
    describe_pair,
    describe_stage,
    estimate_finishes,
)
from servegym.baselines.workflow.online.choice import begin_s
from servegym.cluster.jit import inlined
from servegym.cluster.rng import next_uniform
from servegym.errors import ConfigError
from servegym.typing import FloatArray, UInt64Array
from servegym.workflow.online.policy import Information, Rule, rule
from servegym.workflow.online.state import WAIT
from servegym.workflow.online.view import View, can_start, duration_s

#: Rules that scores can start from, by number; `none` leaves all to the learned part.
BASES = ("none", "srpt-cp", "sjf-cp", "edd", "rank")
_NONE, _SRPT, _SJF, _EDD, _RANK = range(5)
#: Width of embeddings.
EMBED = 8
#: Stages that are looked at, and pairs: those of the first order by the base rule.
MAX_STAGES, MAX_PAIRS = 48, 1024
#: Score that the base rule's choice has over waiting.
BASE_LEAD = 10.0

# Places of the parameters
_BASE, _ETA, _TAU, _SAMPLE, _HIDDEN, _EMBEDS, _THETA = range(7)
_A = _THETA + NUM_PAIR_FEATURES
_B = _A + EMBED * NUM_STAGE_FEATURES
_C = _B + EMBED * EMBED
_D = _C + EMBED * EMBED
_NET = _D + EMBED
# Places of the memory
_KNOWN_JOBS, NUM_ROWS, CHOSEN, _MEAN = range(4)
_X = _MEAN + EMBED
_PART = _X + NUM_STAGE_FEATURES
MAX_HIDDEN = 64
_KEYS = _PART + MAX_HIDDEN
_LIST = _KEYS + MAX_STAGES
ROWS = _LIST + MAX_STAGES
#: A row of a pair: stage, device, base score, score, features.
ROW_STAGE, ROW_DEVICE, ROW_BASE, ROW_SCORE, ROW_FEATURES = range(5)
ROW_WIDTH = ROW_FEATURES + NUM_PAIR_FEATURES
# Columns of a stage's memory
_DONE, _OWN, _JOB = 0, 1, 1 + EMBED
_BEHIND = 1 + 2 * EMBED
_STAGE_COLUMNS = _BEHIND + 1


@inlined
def _embed(
    w: View, v: int, params: FloatArray, memory: FloatArray, stage_memory: FloatArray
) -> None:
    """Embed a known stage from its features and the embeddings of its known children."""
    q = w.stage[v]
    stage_memory[v, _DONE] = 1.0
    behind = 0.0
    for i in range(q.succ_first, q.succ_stop):
        child = w.edge[i].child
        if w.stage[child].hidden == 0:
            behind = max(behind, 1.0 + stage_memory[child, _BEHIND])
    stage_memory[v, _BEHIND] = behind
    if params[_EMBEDS] == 0.0:
        return
    describe_stage(w, v, params[_TAU], memory, _X)
    for k in range(EMBED):
        memory[_MEAN + k] = 0.0
    for i in range(q.succ_first, q.succ_stop):
        child = w.edge[i].child
        if w.stage[child].hidden != 0:
            continue
        for k in range(EMBED):
            y = 0.0
            for n in range(EMBED):
                y += params[_C + k * EMBED + n] * stage_memory[child, _OWN + n]
            memory[_MEAN + k] += max(0.0, y)
    for k in range(EMBED):
        y = params[_D + k]
        for n in range(NUM_STAGE_FEATURES):
            y += params[_A + k * NUM_STAGE_FEATURES + n] * memory[_X + n]
        for n in range(EMBED):
            y += params[_B + k * EMBED + n] * memory[_MEAN + n]
        stage_memory[v, _OWN + k] = max(0.0, y)


@inlined
def _embed_news(w: View, params: FloatArray, memory: FloatArray, stage_memory: FloatArray) -> None:
    """Embed the stages of jobs that have arrived, and hidden stages that have shown."""
    for j in range(int(memory[_KNOWN_JOBS]), w.env[0].next_job):
        job = w.job[j]
        first = job.first_stage
        count = 0.0
        for v in range(first + job.num_stages - 1, first - 1, -1):
            if w.stage[v].hidden == 0:
                _embed(w, v, params, memory, stage_memory)
        for k in range(EMBED):
            stage_memory[first, _JOB + k] = 0.0
        for v in range(first, first + job.num_stages):
            if w.stage[v].hidden == 0:
                count += 1.0
                for k in range(EMBED):
                    stage_memory[first, _JOB + k] += stage_memory[v, _OWN + k]
        for k in range(EMBED):
            stage_memory[first, _JOB + k] /= max(1.0, count)
    memory[_KNOWN_JOBS] = w.env[0].next_job
    for i in range(w.env[0].num_fresh):
        if stage_memory[w.fresh[i], _DONE] == 0.0:
            _embed(w, w.fresh[i], params, memory, stage_memory)


@inlined
def _key(w: View, v: int, base: int) -> float:
    """What the base rule orders stages by, the least first; equal ones by falling rank."""
    job = w.job[w.stage[v].job]
    if base == _SJF:
        return job.work_s
    if base == _EDD:
        return job.arrival_s + job.deadline_s
    if base == _RANK:
        return -w.stage[v].rank_s
    return job.work_left_s


@inlined
def _can_start_somewhere(w: View, v: int) -> bool:
    for d in range(w.env[0].num_devices):  # noqa: SIM110 - kernels know no generators
        if can_start(w, v, d):
            return True
    return False


@inlined
def _is_like_the_last(w: View, i: int) -> bool:
    """Whether a ready stage differs in nothing from the one before it in the list.

    Answers of one question that are sampled at once, for example: one of them stands for all.
    """
    if i == 0:
        return False
    a, b = w.stage[w.ready[i]], w.stage[w.ready[i - 1]]
    if a.job != b.job or a.label != b.label or a.rank_s != b.rank_s or a.kind != b.kind:
        return False
    if a.prompt != b.prompt or a.expected_output != b.expected_output or a.types != b.types:
        return False
    if a.mean_s != b.mean_s or a.pred_stop - a.pred_first != b.pred_stop - b.pred_first:
        return False
    for k in range(a.pred_stop - a.pred_first):
        x, y = w.edge[w.pred[a.pred_first + k]], w.edge[w.pred[b.pred_first + k]]
        if x.parent != y.parent or x.data_bytes != y.data_bytes or x.shared != y.shared:
            return False
    for d in range(w.env[0].num_devices):  # memory for its true output may be there or not
        if can_start(w, w.ready[i], d) != can_start(w, w.ready[i - 1], d):
            return False
    return a.ready_s == b.ready_s


@inlined
def _shortlist(w: View, base: int, memory: FloatArray) -> int:
    """Write the stages that can start and come first by the base rule; return how many."""
    most = min(MAX_STAGES, MAX_PAIRS // w.env[0].num_devices)
    count = 0
    for i in range(w.env[0].num_ready):
        v = w.ready[i]
        if _is_like_the_last(w, i) or not _can_start_somewhere(w, v):
            continue
        key = _key(w, v, base)
        if count == most and key >= memory[_KEYS + most - 1]:
            continue
        k = min(count, most - 1)
        while k > 0 and memory[_KEYS + k - 1] > key:
            memory[_KEYS + k] = memory[_KEYS + k - 1]
            memory[_LIST + k] = memory[_LIST + k - 1]
            k -= 1
        memory[_KEYS + k] = key
        memory[_LIST + k] = v
        count = min(count + 1, most)
    return count


@inlined
def _describe(
    w: View,
    params: FloatArray,
    memory: FloatArray,
    stage_memory: FloatArray,
    device_memory: FloatArray,
) -> int:
    """Write a row for every pair that could start; return how many."""
    base, tau_s = int(params[_BASE]), params[_TAU]
    count = _shortlist(w, base, memory)
    rows = 0
    for i in range(count):
        v = int(memory[_LIST + i])
        behind = 0.0
        if base != _NONE and memory[_KEYS + i] > memory[_KEYS]:
            behind = params[_ETA] * math.log1p((memory[_KEYS + i] - memory[_KEYS]) / tau_s)
        first_s = math.inf
        for d in range(w.env[0].num_devices):
            if can_start(w, v, d):
                first_s = min(first_s, begin_s(w, v, d, w.env[0].now_s) + duration_s(w, v, d))
        least_s = estimate_finishes(w, v, device_memory)
        for d in range(w.env[0].num_devices):
            if not can_start(w, v, d):
                continue
            at = ROWS + rows * ROW_WIDTH
            memory[at + ROW_STAGE] = v
            memory[at + ROW_DEVICE] = d
            memory[at + ROW_BASE] = 0.0
            if base != _NONE:
                later_s = begin_s(w, v, d, w.env[0].now_s) + duration_s(w, v, d) - first_s
                later = params[_ETA] * math.log1p(later_s / tau_s)
                memory[at + ROW_BASE] = BASE_LEAD - behind - later
            describe_pair(
                w,
                v,
                d,
                least_s,
                stage_memory[v, _BEHIND],
                tau_s,
                device_memory,
                memory,
                at + ROW_FEATURES,
            )
            rows += 1
    return rows


@inlined
def _mean_of_jobs(w: View, rows: int, memory: FloatArray, stage_memory: FloatArray) -> None:
    """Write the mean embedding of the jobs of all rows: what competes."""
    for k in range(EMBED):
        memory[_MEAN + k] = 0.0
    for r in range(rows):
        v = int(memory[ROWS + r * ROW_WIDTH + ROW_STAGE])
        first = w.job[w.stage[v].job].first_stage
        for k in range(EMBED):
            memory[_MEAN + k] += stage_memory[first, _JOB + k] / rows


@inlined
def _stage_part(
    w: View, v: int, params: FloatArray, memory: FloatArray, stage_memory: FloatArray
) -> None:
    """Write what a stage, its job and the others give to the hidden layer, the bias included."""
    hidden = int(params[_HIDDEN])
    first = w.job[w.stage[v].job].first_stage
    bias = _NET + hidden * (3 * EMBED + NUM_PAIR_FEATURES)
    for h in range(hidden):
        y = params[bias + h]
        if params[_EMBEDS] > 0.0:
            at = _NET + h * 3 * EMBED
            for k in range(EMBED):
                y += params[at + k] * stage_memory[v, _OWN + k]
                y += params[at + EMBED + k] * stage_memory[first, _JOB + k]
                y += params[at + 2 * EMBED + k] * memory[_MEAN + k]
        memory[_PART + h] = y


@inlined
def _score(row: int, params: FloatArray, memory: FloatArray) -> float:
    """Score a row; the part of its stage must have been written."""
    at = ROWS + row * ROW_WIDTH
    hidden = int(params[_HIDDEN])
    score = memory[at + ROW_BASE]
    for k in range(NUM_PAIR_FEATURES):
        score += params[_THETA + k] * memory[at + ROW_FEATURES + k]
    weights = _NET + hidden * 3 * EMBED
    out = weights + hidden * (NUM_PAIR_FEATURES + 1)
    for h in range(hidden):
        y = memory[_PART + h]
        for k in range(NUM_PAIR_FEATURES):
            y += params[weights + h * NUM_PAIR_FEATURES + k] * memory[at + ROW_FEATURES + k]
        if y > 0.0:
            score += params[out + h] * y
    return score


@rule
def decide(
    w: View,
    params: FloatArray,
    memory: FloatArray,
    stage_memory: FloatArray,
    device_memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Decide; see `workflow.online.policy.rule`. Leaves the rows and the choice in the memory."""
    _embed_news(w, params, memory, stage_memory)
    describe_devices(w, device_memory)
    rows = _describe(w, params, memory, stage_memory, device_memory)
    if params[_HIDDEN] > 0.0 and params[_EMBEDS] > 0.0:
        _mean_of_jobs(w, rows, memory, stage_memory)
    memory[NUM_ROWS] = rows
    best, best_score, last = rows, -math.inf, -1
    if w.env[0].num_started > 0:  # else there may be nothing to wait for
        best_score = 0.0
        if params[_SAMPLE] > 0.0:
            best_score = -math.log(-math.log(next_uniform(rng)))
    for r in range(rows):
        v = int(memory[ROWS + r * ROW_WIDTH + ROW_STAGE])
        if v != last and params[_HIDDEN] > 0.0:
            _stage_part(w, v, params, memory, stage_memory)
        last = v
        score = _score(r, params, memory)
        memory[ROWS + r * ROW_WIDTH + ROW_SCORE] = score
        if params[_SAMPLE] > 0.0:  # Gumbel's noise: the greatest is a draw from the softmax
            score -= math.log(-math.log(next_uniform(rng)))
        if score > best_score:
            best, best_score = r, score
    memory[CHOSEN] = best
    if best == rows:
        return WAIT
    at = ROWS + best * ROW_WIDTH
    return int(memory[at + ROW_STAGE]) * w.env[0].num_devices + int(memory[at + ROW_DEVICE])


@dataclass(frozen=True)
class WorkflowWeights:
    """All numbers of a learned scheduler.

    Attributes:
        base: Rule that scores start from, one of `BASES`.
        eta: Weight of its order.
        tau_s: Unit of times: mean duration of a stage in training.
        theta: Of the linear part, `float64[NUM_PAIR_FEATURES]`.
        embed_own, embed_sum, embed_child, embed_bias: Of message passing: stage features to
            embedding `[EMBED, NUM_STAGE_FEATURES]`, sum of messages to embedding and embedding to
            message `[EMBED, EMBED]`, `[EMBED]`; all empty without message passing.
        context: Embeddings of stage, job and competitors to the hidden layer, `[H, 3 * EMBED]`.
        pair: Pair features to the hidden layer, `[H, NUM_PAIR_FEATURES]`.
        bias: Of the hidden layer, `[H]`; H is at most `MAX_HIDDEN`, and 0 for a linear policy.
        out: Hidden layer to score, `[H]`.
    """

    base: str
    eta: float
    tau_s: float
    theta: FloatArray
    embed_own: FloatArray = field(default_factory=lambda: np.zeros((0, NUM_STAGE_FEATURES)))
    embed_sum: FloatArray = field(default_factory=lambda: np.zeros((0, EMBED)))
    embed_child: FloatArray = field(default_factory=lambda: np.zeros((0, EMBED)))
    embed_bias: FloatArray = field(default_factory=lambda: np.zeros(0))
    context: FloatArray = field(default_factory=lambda: np.zeros((0, 3 * EMBED)))
    pair: FloatArray = field(default_factory=lambda: np.zeros((0, NUM_PAIR_FEATURES)))
    bias: FloatArray = field(default_factory=lambda: np.zeros(0))
    out: FloatArray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise ConfigError(f"base must be one of {', '.join(BASES)}, got {self.base!r}")
        if not (self.eta >= 0 and 0 < self.tau_s < math.inf):
            raise ConfigError(
                f"eta must be at least 0 and tau_s above 0, got {self.eta} and {self.tau_s}"
            )
        hidden, embed = len(self.bias), len(self.embed_bias)
        shapes = {
            "theta": (NUM_PAIR_FEATURES,),
            "embed_own": (embed, NUM_STAGE_FEATURES),
            "embed_sum": (embed, EMBED),
            "embed_child": (embed, EMBED),
            "embed_bias": (embed,),
            "context": (hidden, 3 * EMBED),
            "pair": (hidden, NUM_PAIR_FEATURES),
            "bias": (hidden,),
            "out": (hidden,),
        }
        if hidden > MAX_HIDDEN or embed not in (0, EMBED):
            raise ConfigError(
                f"a scheduler's hidden layer has at most {MAX_HIDDEN} units and its embeddings"
                f" have {EMBED} numbers or none, got {hidden} and {embed}"
            )
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or not np.isfinite(array).all():
                raise ConfigError(
                    f"{name} of a scheduler must be finite numbers of shape {shape}, got shape"
                    f" {array.shape}"
                )

    def pack(self, *, sample: bool = False) -> FloatArray:
        """Return the compiled rule's parameters, `float64[p]`; `sample` draws from the softmax."""
        embeds = float(len(self.embed_bias) > 0)
        zeros = WorkflowWeights.no_embedding() if not embeds else {}
        parts = [
            np.array([BASES.index(self.base), self.eta, self.tau_s, sample, len(self.bias), embeds])
        ]
        names = ("theta", "embed_own", "embed_sum", "embed_child", "embed_bias")
        parts += [np.asarray(zeros.get(name, getattr(self, name)), float) for name in names]
        parts += [getattr(self, name) for name in ("context", "pair", "bias", "out")]
        return np.concatenate([part.ravel() for part in parts]).astype(np.float64)

    @staticmethod
    def no_embedding() -> dict[str, FloatArray]:
        """Return message passing that passes nothing."""
        return {
            "embed_own": np.zeros((EMBED, NUM_STAGE_FEATURES)),
            "embed_sum": np.zeros((EMBED, EMBED)),
            "embed_child": np.zeros((EMBED, EMBED)),
            "embed_bias": np.zeros(EMBED),
        }


class LearnedRule(Rule):
    """A learned scheduler; tables print it bold and never take it for the best rule."""

    learned = True


def learned_rule(
    weights: WorkflowWeights,
    *,
    sample: bool = False,
    name: str = "learned",
    information: Information = "predictive",
) -> LearnedRule:
    """Make a scheduler from its weights; with `sample` it draws actions from the softmax."""
    return LearnedRule(
        name=name,
        information=information,
        decide=decide,
        params=weights.pack(sample=sample),
        memory_size=ROWS + MAX_PAIRS * ROW_WIDTH,
        stage_columns=_STAGE_COLUMNS,
        device_columns=NUM_DEVICE_COLUMNS,
    )
