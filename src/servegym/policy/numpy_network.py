"""The dispatch network of `servegym.agents` in NumPy, for hosts without PyTorch.

One observation at a time, in buffers that are made once per fleet size: a live decision is about
sixty small array operations, and allocating their results would cost as much as they do. Columns
are replicas, as in the contract, so no row is ever gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from servegym.policy.contract import NUM_OBSERVED_FEATURES, ReplicaFeature, RequestFeature
from servegym.typing import BoolArray, Float32Array, FloatArray

#: Added to the logits of forbidden actions, as in training.
MASKED = np.float32(-1e8)
#: Inputs of the network; what they mean is said in `servegym.agents.features`.
NUM_INPUTS = 25
#: Rows of the first block of inputs, all of the form log1p; the others follow.
_LOG_ROWS = (0, 2, 3, 4, 5, 9, 14, 15, 16, 20, 21, 22, 23, 24)
_PLAIN_ROWS = (1, 6, 7, 8, 10, 11, 12, 13, 17, 18, 19)
_NUM_LOG = len(_LOG_ROWS)
_ORDER = [*_LOG_ROWS, *_PLAIN_ROWS]
#: What training subtracts from an input; here from the first layer's bias.
_OFFSETS = {5: 3.0, 22: 1.0, 23: 6.0, 24: 5.0}

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
    """

    family: str
    context: str
    base: str
    base_params: tuple[float, ...]
    eta: float
    num_extra: int


#: The family of networks that this module runs.
FAMILY = "dispatch-1"


class _Buffers:
    """Working memory for one fleet size."""

    def __init__(self, hidden: int, width: int, num_extra: int, attention: bool) -> None:
        def rows(count: int) -> Float32Array:
            return np.zeros((count, width), np.float32)

        self.seen = rows(NUM_OBSERVED_FEATURES)
        self.present = np.zeros(width, np.float32)
        self.inputs = rows(NUM_INPUTS)
        self.first = rows(hidden)
        # own encodings, then (with attention) what the replica attends to
        self.encoded = rows(2 * hidden if attention else hidden)
        self.mixed = rows(hidden)
        self.query = rows(hidden)
        self.scores = np.zeros((width, width) if attention else (0, 0), np.float32)
        self.pooled = np.zeros(2 * hidden, np.float32)
        self.around = np.zeros(hidden, np.float32)
        self.cost = np.zeros(width, np.float32)
        self.mask = np.zeros(width + num_extra, np.float32)
        self.logits = np.zeros(width + num_extra, np.float32)
        self.temp = rows(8)


class NumpyNetwork:
    """Weights of a trained network, ready to score the actions of one observation.

    Args:
        shape: What kind of network.
        weights: `float32` arrays by PyTorch's names.

    Raises:
        ValueError: If the weights are not those of such a network.
    """

    def __init__(self, shape: NetworkShape, weights: Mapping[str, Float32Array]) -> None:
        if shape.family != FAMILY:
            raise ValueError(f"networks of family {shape.family!r} are unknown, only {FAMILY!r}")
        if shape.base not in _COSTS:
            raise ValueError(f"no base cost {shape.base!r}: choose one of {', '.join(_COSTS)}")
        self.shape = shape
        self._attention = shape.context == "attention"
        names = ["actor.own.0", "actor.own.2", "actor.mix", "actor.around", "score", "extra"]
        names += ["actor.query"] if self._attention else []
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
        if first.shape != (hidden, NUM_INPUTS):
            raise ValueError(f"the first layer has shape {first.shape}, not {hidden, NUM_INPUTS}")
        bias = bias.copy()
        for row, offset in _OFFSETS.items():
            bias -= np.float32(offset) * first[:, row]
        self._first = np.ascontiguousarray(first[:, _ORDER])
        self._first_bias = bias[:, None]
        self._second, bias = layer("actor.own.2")
        self._second_bias = bias[:, None]
        self._mix, self._mix_bias = layer("actor.mix")
        self._around, self._around_bias = layer("actor.around")
        score, score_bias = layer("score")
        self._score, self._score_bias = score[0], score_bias[0]
        self._extra, self._extra_bias = layer("extra")
        if self._attention:
            self._query, bias = layer("actor.query")
            self._query_bias = bias[:, None]
        self._scale = np.float32(hidden**-0.5)
        self._buffers: dict[int, _Buffers] = {}

    def logits(
        self, replicas: FloatArray, request: FloatArray, mask: BoolArray | Float32Array
    ) -> Float32Array:
        """Score all actions; forbidden ones get about -1e8.

        Args:
            replicas: Raw features, `float[>= NUM_OBSERVED_FEATURES, R]`.
            request: Raw features, `float[NUM_REQUEST_FEATURES]`.
            mask: Allowed actions, `[R + num_extra]`.

        Returns:
            `float32[R + num_extra]`, overwritten by the next call for as many replicas.
        """
        width = replicas.shape[1]
        b = self._buffers.get(width)
        if b is None:
            b = _Buffers(self._hidden, width, self.shape.num_extra, self._attention)
            self._buffers[width] = b
        np.copyto(b.seen, replicas[:NUM_OBSERVED_FEATURES], casting="unsafe")
        np.copyto(b.mask, mask, casting="unsafe")
        np.greater(b.seen[0], 0.0, out=b.present, casting="unsafe")
        self._describe(b, request)
        self._encode(b)
        cost = b.cost
        np.subtract(1.0, b.mask[:width], out=b.temp[0])
        b.temp[0] *= -MASKED
        b.temp[0] += cost
        cost -= b.temp[0].min() if width else 0.0
        cost *= np.float32(-self.shape.eta)
        scores = b.logits[:width]
        np.matmul(self._score, b.mixed, out=scores)
        scores += self._score_bias
        scores += cost
        if self.shape.num_extra:
            np.maximum(b.around, 0.0, out=b.around)
            np.matmul(self._extra, b.around, out=b.logits[width:])
            b.logits[width:] += self._extra_bias
        b.logits *= b.mask
        np.subtract(1.0, b.mask, out=b.mask)
        b.mask *= MASKED
        b.logits += b.mask
        return b.logits

    def _describe(self, b: _Buffers, request: FloatArray) -> None:
        """Fill the inputs (`agents.features.replica_inputs`) and the base rule's cost."""
        seen, x, log = b.seen, b.inputs, b.inputs[:_NUM_LOG]
        prompt = np.float32(request[_Q["PROMPT_TOKENS"]])
        predicted = np.float32(request[_Q["PREDICTED_OUTPUT_TOKENS"]])
        ttft = np.float32(max(request[_Q["TTFT_SLO_S"]], 1e-3))
        tpot = np.float32(max(request[_Q["TPOT_SLO_S"]], 1e-4))
        outstanding = seen[_R["OUTSTANDING_REQUESTS"]]
        hit, seq_s = seen[_R["PREFIX_HIT_TOKENS"]], seen[_R["DECODE_SEQ_S"]]
        rate, max_seqs, capacity, pending_s, new_s, batch, step_s, drain_s = b.temp
        np.maximum(seen[_R["PREFILL_TOKENS_PER_S"]], 1.0, out=rate)
        np.maximum(seen[_R["MAX_NUM_SEQS"]], 1.0, out=max_seqs)
        np.maximum(seen[_R["KV_CAPACITY_TOKENS"]], 1.0, out=capacity)
        np.divide(seen[_R["PENDING_PREFILL_TOKENS"]], rate, out=pending_s)
        np.subtract(prompt, hit, out=new_s)
        np.maximum(new_s, 0.0, out=new_s)
        new_s /= rate
        np.add(outstanding, 1.0, out=batch)
        np.minimum(batch, max_seqs, out=batch)
        np.subtract(batch, 1.0, out=step_s)
        step_s *= seq_s
        step_s += seen[_R["DECODE_STEP_S"]]
        np.subtract(
            seen[_R["OUTSTANDING_PREDICTED_TOKENS"]], seen[_R["GENERATED_TOKENS"]], out=drain_s
        )
        np.maximum(drain_s, 0.0, out=drain_s)
        drain_s /= batch
        drain_s *= step_s
        log[0] = outstanding
        np.multiply(pending_s, 10.0, out=log[1])
        np.multiply(new_s, 10.0, out=log[2])
        log[3] = drain_s
        np.multiply(step_s, 10.0 * predicted, out=log[4])
        log[5] = seen[_R["NUM_WAITING"]]
        np.multiply(seen[_R["RECENT_TTFT_S"]], 10.0, out=log[6])
        np.multiply(seen[_R["RECENT_TPOT_S"]], 100.0, out=log[7])
        log[8] = seen[_R["SINCE_DISPATCH_S"]]
        np.multiply(outstanding, new_s, out=log[9])
        np.multiply(outstanding, seq_s, out=log[10])
        log[10] *= predicted
        np.multiply(step_s, predicted, out=log[11])
        log[11] += pending_s
        log[11] += new_s
        log[12] = prompt
        log[13] = predicted
        self._cost(b, prompt, predicted)
        np.log1p(log, out=log)
        np.minimum(log[8], 3.0, out=log[8])
        plain = x[_NUM_LOG:]
        np.divide(outstanding, max_seqs, out=plain[0])
        np.divide(hit, max(prompt, np.float32(1.0)), out=plain[1])
        np.multiply(seen[_R["DECODE_STEP_S"]], 100.0, out=plain[2])
        plain[3] = seen[_R["RELATIVE_SPEED"]]
        np.divide(seen[_R["NUM_RUNNING"]], max_seqs, out=plain[4])
        plain[5] = seen[_R["KV_CACHE_USAGE"]]
        np.divide(seen[_R["OUTSTANDING_PROMPT_TOKENS"]], capacity, out=plain[6])
        np.divide(prompt + predicted, capacity, out=plain[7])
        np.minimum(seen[_R["METRICS_AGE_S"]], 2.0, out=plain[8])
        np.add(pending_s, new_s, out=plain[9])
        plain[9] /= ttft
        np.divide(step_s, tpot, out=plain[10])
        np.minimum(plain[9:11], 4.0, out=plain[9:11])

    def _cost(self, b: _Buffers, prompt: np.float32, predicted: np.float32) -> None:
        """Fill the cost of the base rule (`agents.features.base_cost`)."""
        seen, cost, params = b.seen, b.cost, self.shape.base_params
        load, speed = seen[_R["OUTSTANDING_REQUESTS"]], seen[_R["RELATIVE_SPEED"]]
        pending_s, new_s = b.temp[3], b.temp[4]
        if self.shape.base == "least-outstanding":
            np.copyto(cost, load)
        elif self.shape.base == "speed-family":
            np.add(load, 1.0, out=cost)
            cost /= np.maximum(speed, 1e-6) ** np.float32(params[0])
        elif self.shape.base == "prefix-load":
            np.add(load, 1.0, out=cost)
            cost *= np.float32(params[0])
            cost /= np.maximum(speed, 1e-6) ** np.float32(params[1])
            cost += pending_s
            cost += new_s
        else:  # added-delay
            np.multiply(seen[_R["DECODE_SEQ_S"]], predicted, out=cost)
            cost *= np.float32(1.0 + params[1])
            cost += np.float32(params[0]) * new_s
            cost *= load
            cost += pending_s
            cost += new_s
            cost += predicted * seen[_R["DECODE_STEP_S"]]

    def _encode(self, b: _Buffers) -> None:
        """Run the shared encoder over the inputs."""
        hidden = self._hidden
        own = b.encoded[:hidden]
        np.matmul(self._first, b.inputs, out=b.first)
        b.first += self._first_bias
        np.maximum(b.first, 0.0, out=b.first)
        np.matmul(self._second, b.first, out=own)
        own += self._second_bias
        np.maximum(own, 0.0, out=own)
        own *= b.present
        np.matmul(own, b.present, out=b.pooled[:hidden])
        b.pooled[:hidden] /= max(b.present.sum(), np.float32(1.0))
        own.max(1, out=b.pooled[hidden:])
        np.matmul(self._around, b.pooled, out=b.around)
        b.around += self._around_bias
        if self._attention:
            self._attend(b, own)
        np.matmul(self._mix, b.encoded, out=b.mixed)
        b.mixed += (b.around + self._mix_bias)[:, None]
        np.maximum(b.mixed, 0.0, out=b.mixed)

    def _attend(self, b: _Buffers, own: Float32Array) -> None:
        """Let each replica look at the others: scores are `[replica, other]`."""
        np.matmul(self._query, own, out=b.query)
        b.query += self._query_bias
        np.matmul(b.query.T, own, out=b.scores)
        b.scores *= self._scale
        np.subtract(1.0, b.present, out=b.temp[0])
        b.temp[0] *= MASKED
        b.scores += b.temp[0]
        b.scores -= b.scores.max(1, keepdims=True)
        np.exp(b.scores, out=b.scores)
        b.scores /= b.scores.sum(1, keepdims=True)
        np.matmul(own, b.scores.T, out=b.encoded[self._hidden :])


_COSTS = ("added-delay", "prefix-load", "speed-family", "least-outstanding")
