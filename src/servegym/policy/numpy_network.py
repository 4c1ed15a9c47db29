"""The dispatch network of `servegym.agents` in NumPy, for hosts without PyTorch.

One observation at a time, in buffers that are made once per fleet size: a live decision is about
sixty small array operations, and allocating their results would cost as much as they do. Columns
are replicas, as in the contract, so no row is ever gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from servegym.policy.contract import (
    OUTSTANDING_AS_TIGHT,
    PUSHED_OVER_100,
    ReplicaFeature,
    RequestFeature,
    observed,
)
from servegym.policy.costs import BASES, HELD_BASES, INFERRED_BASES
from servegym.typing import BoolArray, Float32Array, FloatArray

#: Added to the logits of forbidden actions, as in training.
MASKED = np.float32(-1e8)
#: Costs below this one count as this one where logarithms are taken.
LEAST_COST = 1e-6
#: Inputs of the network a replica; what they mean is said in `servegym.agents.features`. First
#: those of the plain observation, then those of the extended one, then what is arriving, then who
#: is on hold.
_NUM_PLAIN, _NUM_EXTENDED, _NUM_ARRIVALS, _NUM_HELD = 25, 38, 40, 42
#: Rows of the first block of inputs, all of the form log1p; the others follow.
_LOG_ROWS = (0, 2, 3, 4, 5, 9, 14, 15, 16, 20, 21, 22, 23, 24)
_PLAIN_ROWS = (1, 6, 10, 12, 13, 18, 19, 7, 8, 11, 17)
_NUM_LOG = len(_LOG_ROWS)
#: Inputs that are rows of the observation as they are: which rows, and where they go.
_LOG_COPIES = ("NUM_WAITING", "RECENT_TTFT_S", "RECENT_TPOT_S", "SINCE_DISPATCH_S")
_LOG_COPIED = slice(5, 9)
_PLAIN_COPIES = ("DECODE_STEP_S", "RELATIVE_SPEED", "KV_CACHE_USAGE", "METRICS_AGE_S")
_PLAIN_COPIED = slice(_NUM_LOG + 7, _NUM_LOG + 11)
_SLO_SHARES = slice(_NUM_LOG + 5, _NUM_LOG + 7)
#: What the inputs of the first block are multiplied by before the logarithm.
_LOG_SCALES = np.array([1, 10, 10, 1, 10, 1, 10, 100, 1, 1, 1, 1, 1, 1], np.float32)[:, None]
_ORDER = [*_LOG_ROWS, *_PLAIN_ROWS]
#: What training subtracts from an input; here from the first layer's bias.
_OFFSETS = {5: 3.0, 22: 1.0, 23: 6.0, 24: 5.0}
_EXTENDED_OFFSETS = {28: 5.0}
#: Of the inputs of the extended observation these are of the form log1p.
_EXTENDED_LOG = slice(28, _NUM_EXTENDED)
_LIMIT_COPIED = slice(32, _NUM_EXTENDED)
_STEP_INPUT = 7

#: OpenBLAS starts threads for products above 2**18 multiplications, and for one of a matrix and
#: a vector above 9,216; waiting for them takes milliseconds where cores are busy.
_MAX_PRODUCT = 2**17

_R = {f.name: int(f) for f in ReplicaFeature}
_Q = {f.name: int(f) for f in RequestFeature}


class NetworkShape(NamedTuple):
    """What the weights alone do not say of a network.

    Attributes:
        family: Names the inputs and layers; another family cannot be run here.
        context: `"mean"` or `"attention"`.
        base: Rule whose cost the logits start from.
        base_params: Its parameters.
        eta: Weight of that cost.
        num_extra: Actions besides the replicas.
        relative: Whether the cost counts by its logarithm.
    """

    family: str
    context: str
    base: str
    base_params: tuple[float, ...]
    eta: float
    num_extra: int
    relative: bool = False


#: Families of networks that this module runs: with the plain observation, the extended one, this
#: one and what is arriving, and all that and who is on hold, for those that decide about holds.
FAMILY, EXTENDED_FAMILY, ARRIVALS_FAMILY, HELD_FAMILY = (
    "dispatch-1",
    "dispatch-extended-1",
    "dispatch-extended-2",
    "dispatch-held-1",
)
_FAMILIES = (FAMILY, EXTENDED_FAMILY, ARRIVALS_FAMILY, HELD_FAMILY)


def family_of(*, extended: bool, arrivals: bool, holds: bool = False) -> str:
    """Return the family of networks with such inputs."""
    if holds:
        return HELD_FAMILY
    if arrivals:
        return ARRIVALS_FAMILY
    return EXTENDED_FAMILY if extended else FAMILY


def num_inputs(*, extended: bool, arrivals: bool = False, holds: bool = False) -> int:
    """Return how many inputs a replica has, with a plain or an extended observation."""
    if holds:
        return _NUM_HELD
    if arrivals:
        return _NUM_ARRIVALS
    return _NUM_EXTENDED if extended else _NUM_PLAIN


_ONE, _ZERO = np.float32(1.0), np.float32(0.0)
_LOG_INDEX = np.array([_R[name] for name in _LOG_COPIES])
_PLAIN_INDEX = np.array([_R[name] for name in _PLAIN_COPIES])


def _multiply(a: Float32Array, b: Float32Array, out: Float32Array) -> None:
    """Matrix product, in pieces that the BLAS computes in this thread."""
    rows, inner = a.shape
    columns = b.shape[1]
    step = max(1, _MAX_PRODUCT // (rows * inner))
    if columns <= step:
        np.matmul(a, b, out=out)
        return
    for begin in range(0, columns, step):
        part = slice(begin, begin + step)
        out[:, part] = a @ b[:, part]


class _Buffers:
    """Working memory for one fleet size, with a view of every row that is used by itself."""

    def __init__(
        self,
        hidden: int,
        width: int,
        num_extra: int,
        *,
        attention: bool,
        extended: bool,
        arrivals: bool,
        holds: bool,
    ) -> None:
        def rows(count: int) -> Float32Array:
            return np.zeros((count, width), np.float32)

        self.width = width
        self.seen = rows(observed(extended=extended).replicas)
        self.seen_rows = list(self.seen)
        self.present = np.zeros(width, np.float32)
        self.inputs = rows(num_inputs(extended=extended, arrivals=arrivals, holds=holds))
        self.input_rows = list(self.inputs)
        self.log = self.inputs[:_NUM_LOG]
        self.log_copied = self.inputs[_LOG_COPIED]
        self.plain_copied = self.inputs[_PLAIN_COPIED]
        self.slo_shares = self.inputs[_SLO_SHARES]
        self.extended_log = self.inputs[_EXTENDED_LOG]
        self.limit_copied = self.inputs[_LIMIT_COPIED]
        self.first = rows(hidden)
        # own encodings, then (with attention) what the replica attends to
        self.encoded = rows(2 * hidden if attention else hidden)
        self.own = self.encoded[:hidden]
        self.attended = self.encoded[hidden:]
        self.mixed = rows(hidden)
        self.query = rows(hidden)
        self.scores = np.zeros((width, width) if attention else (0, 0), np.float32)
        self.pooled = np.zeros(2 * hidden, np.float32)
        self.mean, self.most = self.pooled[:hidden], self.pooled[hidden:]
        self.around = np.zeros(hidden, np.float32)
        self.around_bias = np.zeros((hidden, 1), np.float32)
        self.cost = np.zeros(width, np.float32)
        self.hold = np.zeros(width, np.float32)
        self.mask = np.zeros(width + num_extra, np.float32)
        self.logits = np.zeros(width + num_extra, np.float32)
        self.temp = rows(8)
        self.temp_rows = list(self.temp)


class NumpyNetwork:
    """Weights of a trained network, ready to score the actions of one observation.

    Args:
        shape: What kind of network.
        weights: `float32` arrays by PyTorch's names.

    Raises:
        ValueError: If the weights are not those of such a network.
    """

    def __init__(self, shape: NetworkShape, weights: Mapping[str, Float32Array]) -> None:
        if shape.family not in _FAMILIES:
            raise ValueError(
                f"networks of family {shape.family!r} are unknown, only {', '.join(_FAMILIES)}"
            )
        if shape.base not in BASES:
            raise ValueError(f"no base cost {shape.base!r}: choose one of {', '.join(BASES)}")
        if shape.base in INFERRED_BASES and shape.family == FAMILY:
            raise ValueError(f"base cost {shape.base} needs a network of family {EXTENDED_FAMILY}")
        if (shape.base in HELD_BASES) != (shape.family == HELD_FAMILY):
            raise ValueError(
                f"base cost {shape.base} and family {shape.family} do not go together: networks "
                f"of family {HELD_FAMILY}, and no others, hold requests"
            )
        if shape.family == HELD_FAMILY and shape.num_extra == 0:
            raise ValueError(f"a network of family {HELD_FAMILY} must have the action to hold")
        self.shape = shape
        self._attention = shape.context == "attention"
        self._extended = shape.family != FAMILY
        self._holds = shape.family == HELD_FAMILY
        self._arrivals = self._holds or shape.family == ARRIVALS_FAMILY
        names = ["actor.own.0", "actor.own.2", "actor.mix", "actor.around", "score", "extra"]
        names += ["actor.query"] if self._attention else []
        names += ["hold"] if self._holds else []
        missing = [n for n in names if f"{n}.weight" not in weights or f"{n}.bias" not in weights]
        if missing:
            raise ValueError(f"the weights of {', '.join(missing)} are missing")

        def layer(name: str) -> tuple[Float32Array, Float32Array]:
            weight, bias = (
                np.ascontiguousarray(weights[f"{name}.{part}"], np.float32)
                for part in ("weight", "bias")
            )
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise ValueError(f"the weights of {name} are not all finite")
            return weight, bias

        first, bias = layer("actor.own.0")
        self._hidden = hidden = len(bias)
        inputs = num_inputs(extended=self._extended, arrivals=self._arrivals, holds=self._holds)
        if first.shape != (hidden, inputs):
            raise ValueError(f"the first layer has shape {first.shape}, not {hidden, inputs}")
        bias = bias.copy()
        for row, offset in (_OFFSETS | (_EXTENDED_OFFSETS if self._extended else {})).items():
            bias -= np.float32(offset) * first[:, row]
        first = first.copy()
        first[:, _STEP_INPUT] *= np.float32(100.0)  # that input is the step in units of 10 ms
        self._first = np.ascontiguousarray(first[:, [*_ORDER, *range(_NUM_PLAIN, inputs)]])
        self._first_bias = bias[:, None]
        self._second, bias = layer("actor.own.2")
        self._second_bias = bias[:, None]
        self._mix, self._mix_bias = layer("actor.mix")
        self._around, self._around_bias = layer("actor.around")
        score, score_bias = layer("score")
        self._score, self._score_bias = np.ascontiguousarray(score.T), score_bias[0]
        self._extra, self._extra_bias = layer("extra")
        if self._holds:
            hold, hold_bias = layer("hold")
            self._hold, self._hold_bias = hold[0], hold_bias[0]
        if self._attention:
            self._query, bias = layer("actor.query")
            self._query_bias = bias[:, None]
        self._minus_eta = np.float32(-shape.eta)
        self._params = [np.float32(value) for value in shape.base_params]
        self._scale = np.float32(hidden**-0.5)
        self._buffers: dict[int, _Buffers] = {}

    def logits(
        self, replicas: FloatArray, request: FloatArray, mask: BoolArray | Float32Array
    ) -> Float32Array:
        """Score all actions; forbidden ones get about -1e8.

        Args:
            replicas: Raw features, `float[>= F, R]` with F of `contract.observed`.
            request: Raw features, `float[>= G]`.
            mask: Allowed actions, `[R + num_extra]`.

        Returns:
            `float32[R + num_extra]`, overwritten by the next call for as many replicas.
        """
        width = replicas.shape[1]
        b = self._buffers.get(width)
        if b is None:
            b = _Buffers(
                self._hidden,
                width,
                self.shape.num_extra,
                attention=self._attention,
                extended=self._extended,
                arrivals=self._arrivals,
                holds=self._holds,
            )
            self._buffers[width] = b
        np.copyto(b.seen, replicas[: len(b.seen)], casting="unsafe")
        np.copyto(b.mask, mask, casting="unsafe")
        np.greater(b.seen_rows[0], _ZERO, out=b.present, casting="unsafe")
        self._describe(b, request)
        self._encode(b)
        cost, forbidden = b.cost, b.temp_rows[0]
        np.subtract(_ONE, b.mask[:width], out=forbidden)
        np.multiply(forbidden, -MASKED, out=forbidden)
        np.add(forbidden, cost, out=forbidden)
        np.subtract(cost, forbidden.min(initial=np.inf), out=cost)
        np.multiply(cost, self._minus_eta, out=cost)
        scores = b.logits[:width]
        if self._holds:
            self._hold_logits(b, request)
        np.multiply(b.mixed, self._score, out=b.mixed)
        np.add.reduce(b.mixed, 0, out=scores)
        np.add(scores, cost, out=scores)
        np.add(scores, self._score_bias, out=scores)
        if self.shape.num_extra:
            np.maximum(b.around, _ZERO, out=b.around)
            np.matmul(self._extra, b.around, out=b.logits[width:])
            b.logits[width:] += self._extra_bias
        np.multiply(b.logits, b.mask, out=b.logits)
        np.subtract(_ONE, b.mask, out=b.mask)
        np.multiply(b.mask, MASKED, out=b.mask)
        np.add(b.logits, b.mask, out=b.logits)
        if self._holds and b.mask[width] == 0.0:  # it is not forbidden
            best = int(scores.argmax())
            b.logits[width] = scores[best] + b.hold[best]
        return b.logits

    def _hold_logits(self, b: _Buffers, request: FloatArray) -> None:
        """Fill what the logit of a hold is beyond the best replica's, if a replica is that."""
        _, _, wait_s, most_s, _ = self._params
        pending_s, eta = b.temp_rows[3], -self._minus_eta
        if np.float32(request[_WAITED]) >= most_s:
            b.hold.fill(MASKED)
        else:
            np.subtract(pending_s, wait_s, out=b.hold)
            np.multiply(b.hold, eta, out=b.hold)
        b.hold += self._hold @ b.mixed + self._hold_bias

    def _describe(self, b: _Buffers, request: FloatArray) -> None:
        """Fill the inputs (`agents.features.replica_inputs`) and the base rule's cost."""
        seen, x = b.seen_rows, b.input_rows
        prompt = np.float32(request[_PROMPT])
        predicted = np.float32(request[_PREDICTED])
        ttft = np.float32(max(request[_TTFT], 1e-3))
        tpot = np.float32(max(request[_TPOT], 1e-4))
        outstanding, hit, seq_s = seen[_OUTSTANDING], seen[_HIT], seen[_SEQ]
        rate, max_seqs, capacity, pending_s, new_s, batch, step_s, drain_s = b.temp_rows
        np.maximum(seen[_RATE], _ONE, out=rate)
        np.maximum(seen[_MAX_SEQS], _ONE, out=max_seqs)
        np.maximum(seen[_CAPACITY], _ONE, out=capacity)
        np.divide(seen[_PENDING], rate, out=pending_s)
        np.subtract(prompt, hit, out=new_s)
        np.maximum(new_s, _ZERO, out=new_s)
        np.divide(new_s, rate, out=new_s)
        np.add(outstanding, _ONE, out=batch)
        np.minimum(batch, max_seqs, out=batch)
        np.subtract(batch, _ONE, out=step_s)
        np.multiply(step_s, seq_s, out=step_s)
        np.add(step_s, seen[_STEP], out=step_s)
        np.subtract(seen[_LEFT], seen[_GENERATED], out=drain_s)
        np.maximum(drain_s, _ZERO, out=drain_s)
        np.divide(drain_s, batch, out=drain_s)
        np.multiply(drain_s, step_s, out=x[3])
        x[0][:] = outstanding
        x[1][:] = pending_s
        x[2][:] = new_s
        np.multiply(step_s, predicted, out=x[4])
        np.take(b.seen, _LOG_INDEX, 0, out=b.log_copied, mode="clip")
        np.multiply(outstanding, new_s, out=x[9])
        np.multiply(outstanding, seq_s, out=x[10])
        np.multiply(x[10], predicted, out=x[10])
        waiting_s = x[_NUM_LOG + 5]
        np.add(pending_s, new_s, out=waiting_s)
        np.add(x[4], waiting_s, out=x[11])
        x[12].fill(prompt)
        x[13].fill(predicted)
        if self._extended:
            self._describe_inferred(b, request, tpot)
        if self._arrivals:
            self._describe_arrivals(b, request)
        self._cost(b, waiting_s, request)
        np.multiply(b.log, _LOG_SCALES, out=b.log)
        np.log1p(b.log, out=b.log)
        np.minimum(x[8], _THREE, out=x[8])
        np.divide(outstanding, max_seqs, out=x[_NUM_LOG])
        np.divide(hit, max(prompt, _ONE), out=x[_NUM_LOG + 1])
        np.divide(seen[_RUNNING], max_seqs, out=x[_NUM_LOG + 2])
        np.divide(seen[_HELD_PROMPT], capacity, out=x[_NUM_LOG + 3])
        np.divide(prompt + predicted, capacity, out=x[_NUM_LOG + 4])
        np.divide(waiting_s, ttft, out=waiting_s)
        np.divide(step_s, tpot, out=x[_NUM_LOG + 6])
        np.minimum(b.slo_shares, _FOUR, out=b.slo_shares)
        np.take(b.seen, _PLAIN_INDEX, 0, out=b.plain_copied, mode="clip")
        np.minimum(x[_NUM_LOG + 10], _TWO, out=x[_NUM_LOG + 10])

    def _describe_inferred(self, b: _Buffers, request: FloatArray, tpot: np.float32) -> None:
        """Fill the inputs that the extended observation adds."""
        seen, x = b.seen_rows, b.input_rows[_NUM_PLAIN:]
        batch, step_s = b.temp_rows[5], b.temp_rows[6]
        expected = np.float32(request[_EXPECTED])
        np.clip(seen[_RATIO], _LEAST_RATIO, _LARGEST_RATIO, out=x[0])
        np.log(x[0], out=x[0])
        np.divide(seen[_ITL], tpot, out=x[1])
        np.minimum(x[1], _FOUR, out=x[1])
        x[2].fill(min(np.float32(request[_SPREAD]), _FOUR))
        x[3].fill(expected)
        np.multiply(seen[_ITL], _HUNDRED, out=x[4])
        np.divide(seen[_EXPECTED_LEFT], batch, out=x[5])
        np.multiply(x[5], step_s, out=x[5])
        np.multiply(seen[_OUTSTANDING], seen[_SEQ], out=x[6])
        np.multiply(x[6], expected, out=x[6])
        np.copyto(b.limit_copied, b.seen[OUTSTANDING_AS_TIGHT : PUSHED_OVER_100 + 1])
        np.log1p(b.extended_log, out=b.extended_log)

    def _describe_arrivals(self, b: _Buffers, request: FloatArray) -> None:
        """Fill what is arriving (`agents.features.arriving_shares`)."""
        seen, x, up = b.seen_rows, b.input_rows[_NUM_EXTENDED:], b.present
        count = np.dot(seen[_OUTSTANDING], up) + _ONE
        prompt = (np.dot(seen[_HELD_PROMPT], up) + np.float32(request[_PROMPT])) / count
        output = (np.dot(seen[_LEFT], up) + np.float32(request[_PREDICTED])) / count
        rate_rps = np.float32(request[_ARRIVALS])
        prefill_rate = max(np.dot(seen[_RATE], up), _ONE)
        np.maximum(seen[_SEQ], _LEAST_SEQ, out=b.temp_rows[7])
        np.divide(up, b.temp_rows[7], out=b.temp_rows[7])
        decode_rate = max(np.add.reduce(b.temp_rows[7]), _ONE)
        x[0].fill(min(rate_rps * prompt / prefill_rate, _FOUR))
        x[1].fill(min(rate_rps * output / decode_rate, _FOUR))
        if self._holds:
            x[2].fill(np.log1p(np.float32(request[_NUM_ON_HOLD])))
            x[3].fill(np.log1p(np.float32(request[_WAITED])))

    def _cost(self, b: _Buffers, waiting_s: Float32Array, request: FloatArray) -> None:
        """Fill the cost of the base rule (`policy.costs`)."""
        seen, cost, params = b.seen_rows, b.cost, self._params
        load, speed = seen[_OUTSTANDING], seen[_SPEED]
        predicted = np.float32(request[_PREDICTED])
        if self.shape.base == "least-outstanding":
            np.copyto(cost, load)
        elif self.shape.base == "speed-family":
            np.add(load, _ONE, out=cost)
            np.divide(cost, np.maximum(speed, _SLOWEST) ** params[0], out=cost)
        elif self.shape.base == "prefix-load":
            np.add(load, _ONE, out=cost)
            np.multiply(cost, params[0], out=cost)
            np.divide(cost, np.maximum(speed, _SLOWEST) ** params[1], out=cost)
            np.add(cost, waiting_s, out=cost)
        elif self.shape.base in INFERRED_BASES:
            if self._holds:
                (prefill, decode, _, _, shrink), observed, displaced = params, _ZERO, _ZERO
            else:
                prefill, decode, shrink, observed, displaced = (*params, _ZERO)[:5]
            tokens = predicted + shrink * (np.float32(request[_EXPECTED]) - predicted)
            np.multiply(load, seen[_SEQ], out=cost)
            np.multiply(cost, _ONE + decode, out=cost)
            np.add(cost, seen[_STEP], out=cost)
            np.multiply(cost, tokens, out=cost)
            np.add(cost, waiting_s, out=cost)
            other = b.temp_rows[7]
            np.multiply(b.input_rows[9], prefill, out=other)
            np.add(cost, other, out=cost)
            if not self._holds:
                np.multiply(cost, seen[_RATIO] ** observed, out=cost)
            if displaced > 0.0:
                np.subtract(np.float32(request[_PROMPT]), seen[_HIT], out=other)
                np.maximum(other, _ZERO, out=other)
                np.multiply(other, displaced, out=other)
                np.divide(other, b.temp_rows[2], out=other)  # the capacity, see _describe
                np.add(cost, other, out=cost)
        else:  # added-delay; the inputs' rows hold load * new_s and load * slowed_s
            np.multiply(b.input_rows[9], params[0], out=cost)
            np.add(cost, waiting_s, out=cost)
            other = b.temp_rows[7]
            np.multiply(b.input_rows[10], _ONE + params[1], out=other)
            np.add(cost, other, out=cost)
            np.multiply(seen[_STEP], predicted, out=other)
            np.add(cost, other, out=cost)
        if self.shape.relative:
            np.maximum(cost, _LEAST_COST, out=cost)
            np.log(cost, out=cost)

    def _encode(self, b: _Buffers) -> None:
        """Run the shared encoder over the inputs."""
        own = b.own
        _multiply(self._first, b.inputs, b.first)
        np.add(b.first, self._first_bias, out=b.first)
        np.maximum(b.first, _ZERO, out=b.first)
        _multiply(self._second, b.first, own)
        np.add(own, self._second_bias, out=own)
        np.maximum(own, _ZERO, out=own)
        np.multiply(own, b.present, out=own)
        np.add.reduce(own, 1, out=b.mean)
        np.divide(b.mean, max(np.add.reduce(b.present), _ONE), out=b.mean)
        np.maximum.reduce(own, 1, out=b.most)
        np.matmul(self._around, b.pooled, out=b.around)
        np.add(b.around, self._around_bias, out=b.around)
        if self._attention:
            self._attend(b)
        _multiply(self._mix, b.encoded, b.mixed)
        np.add(b.around, self._mix_bias, out=b.around_bias[:, 0])
        np.add(b.mixed, b.around_bias, out=b.mixed)
        np.maximum(b.mixed, _ZERO, out=b.mixed)

    def _attend(self, b: _Buffers) -> None:
        """Let each replica look at the others: scores are `[other, replica]`."""
        _multiply(self._query, b.own, b.query)
        np.add(b.query, self._query_bias, out=b.query)
        np.multiply(b.query, self._scale, out=b.query)
        _multiply(b.own.T, b.query, b.scores)
        absent = b.temp_rows[0]
        np.subtract(_ONE, b.present, out=absent)
        np.multiply(absent, MASKED, out=absent)
        np.add(b.scores, absent[:, None], out=b.scores)
        np.subtract(b.scores, b.scores.max(0), out=b.scores)
        np.exp(b.scores, out=b.scores)
        total = b.scores.sum(0)
        _multiply(b.own, b.scores, b.attended)
        np.divide(b.attended, total, out=b.attended)


_TWO, _THREE, _FOUR = np.float32(2.0), np.float32(3.0), np.float32(4.0)
_SLOWEST, _LEAST_COST = np.float32(1e-6), np.float32(LEAST_COST)
_OUTSTANDING, _PENDING = _R["OUTSTANDING_REQUESTS"], _R["PENDING_PREFILL_TOKENS"]
_LEFT, _HELD_PROMPT = _R["OUTSTANDING_PREDICTED_TOKENS"], _R["OUTSTANDING_PROMPT_TOKENS"]
_SPEED, _RATE, _STEP, _SEQ = (
    _R[name] for name in ("RELATIVE_SPEED", "PREFILL_TOKENS_PER_S", "DECODE_STEP_S", "DECODE_SEQ_S")
)
_CAPACITY, _MAX_SEQS = _R["KV_CAPACITY_TOKENS"], _R["MAX_NUM_SEQS"]
_RUNNING, _GENERATED, _HIT = _R["NUM_RUNNING"], _R["GENERATED_TOKENS"], _R["PREFIX_HIT_TOKENS"]
_PROMPT, _PREDICTED = _Q["PROMPT_TOKENS"], _Q["PREDICTED_OUTPUT_TOKENS"]
_ARRIVALS, _LEAST_SEQ = _Q["ARRIVAL_RATE_RPS"], np.float32(1e-6)
_WAITED, _NUM_ON_HOLD = _Q["WAITED_S"], _Q["NUM_HELD"]
_TTFT, _TPOT = _Q["TTFT_SLO_S"], _Q["TPOT_SLO_S"]
_RATIO, _ITL, _EXPECTED_LEFT = (
    _R[name] for name in ("STEP_TIME_RATIO", "RECENT_ITL_S", "EXPECTED_TOKENS_LEFT")
)
_EXPECTED, _SPREAD = _Q["EXPECTED_TOKENS"], _Q["EXPECTED_TOKENS_SPREAD"]
_LEAST_RATIO, _LARGEST_RATIO, _HUNDRED = np.float32(0.05), np.float32(20.0), np.float32(100.0)
