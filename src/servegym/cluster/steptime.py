"""How long steps last: grid look-ups, and whole stretches of decode steps in closed form."""

from __future__ import annotations

import math

from servegym.cluster.jit import inlined
from servegym.cluster.rng import step_noise_z
from servegym.cluster.state import Params, State
from servegym.typing import FloatArray


@inlined
def locate(knots: FloatArray, x: float) -> int:
    """Return i such that x is between knots i and i + 1 (the outermost pair for x outside).

    Counting them all is vectorised: of 16 to 48 it takes 3 to 6 ns, and halving, of which the
    processor foresees no step, 18 to 28 ns.
    """
    i = 0
    for k in range(1, knots.shape[0] - 1):
        i += knots[k] <= x
    return i


@inlined
def dense_s(p: Params, t: int, tokens: int) -> float:
    """Seconds of one step of type `t` without attention: overhead, GEMMs and collectives."""
    knots, values = p.dense_tokens[t], p.dense_s[t]
    i = locate(knots, tokens)
    w = (tokens - knots[i]) / (knots[i + 1] - knots[i])
    return p.cpu_s[t] + values[i] + w * (values[i + 1] - values[i])


@inlined
def prefill_s(p: Params, t: int, chunk: int, context: int) -> float:
    """Attention seconds of `chunk` new tokens over `context` cached ones."""
    ck, hk, v = p.prefill_chunk[t], p.prefill_context[t], p.prefill_s[t]
    i, j = locate(ck, chunk), locate(hk, context)
    w = (chunk - ck[i]) / (ck[i + 1] - ck[i])
    z = (context - hk[j]) / (hk[j + 1] - hk[j])
    low = v[i, j] + z * (v[i, j + 1] - v[i, j])
    high = v[i + 1, j] + z * (v[i + 1, j + 1] - v[i + 1, j])
    return low + w * (high - low)


@inlined
def mixed_s(p: Params, t: int, batch: int, kv_tokens: int) -> float:
    """Attention seconds of `batch` decodes over `kv_tokens` in all, in a step that prefills."""
    return _attention_s(p, t, p.mixed_s[t], batch, kv_tokens)


@inlined
def decode_s(p: Params, t: int, batch: int, kv_tokens: int) -> float:
    """The same in a step that does not prefill."""
    return _attention_s(p, t, p.decode_s[t], batch, kv_tokens)


@inlined
def _attention_s(p: Params, t: int, v: FloatArray, batch: int, kv_tokens: int) -> float:
    bk, kk = p.decode_batch[t], p.decode_kv[t]
    i, j = locate(bk, batch), locate(kk, kv_tokens)
    w = (batch - bk[i]) / (bk[i + 1] - bk[i])
    z = (kv_tokens - kk[j]) / (kk[j + 1] - kk[j])
    low = v[i, j] + z * (v[i, j + 1] - v[i, j])
    high = v[i + 1, j] + z * (v[i + 1, j + 1] - v[i + 1, j])
    return low + w * (high - low)


@inlined
def decode_span_s(p: Params, t: int, batch: int, kv_tokens: int, num_steps: int) -> float:
    """Seconds of `num_steps` decode steps in a row; the first attends to `kv_tokens`.

    Each step attends to `batch` tokens more, so between two knots the step times are an
    arithmetic series.
    """
    bk, kk, v = p.decode_batch[t], p.decode_kv[t], p.decode_s[t]
    i = locate(bk, batch)
    w = (batch - bk[i]) / (bk[i + 1] - bk[i])
    j = locate(kk, kv_tokens)
    last = kk.shape[0] - 2
    base = dense_s(p, t, batch)
    total = 0.0
    left = num_steps
    kv = kv_tokens
    while True:
        low = v[i, j] + w * (v[i + 1, j] - v[i, j])
        high = v[i, j + 1] + w * (v[i + 1, j + 1] - v[i, j + 1])
        slope = (high - low) / (kk[j + 1] - kk[j])
        m = left
        if j < last:
            m = min(left, max(1, math.ceil((kk[j + 1] - kv) / batch)))
        first = base + low + slope * (kv - kk[j])
        total += m * first + slope * batch * (0.5 * m * (m - 1))
        left -= m
        if left == 0:
            return total
        kv += m * batch
        while j < last and kk[j + 1] <= kv:
            j += 1


@inlined
def decode_steps_past(
    p: Params, t: int, batch: int, kv_tokens: int, target_s: float, max_steps: int
) -> int:
    """Smallest number of decode steps that take longer than `target_s`, at most `max_steps`."""
    bk, kk, v = p.decode_batch[t], p.decode_kv[t], p.decode_s[t]
    i = locate(bk, batch)
    w = (batch - bk[i]) / (bk[i + 1] - bk[i])
    j = locate(kk, kv_tokens)
    last = kk.shape[0] - 2
    base = dense_s(p, t, batch)
    done = 0
    spent = 0.0
    kv = kv_tokens
    while True:
        low = v[i, j] + w * (v[i + 1, j] - v[i, j])
        high = v[i, j + 1] + w * (v[i + 1, j + 1] - v[i, j + 1])
        slope = (high - low) / (kk[j + 1] - kk[j])
        m = max_steps - done
        if j < last:
            m = min(m, max(1, math.ceil((kk[j + 1] - kv) / batch)))
        first = base + low + slope * (kv - kk[j])
        growth = slope * batch
        whole = m * first + growth * (0.5 * m * (m - 1))
        if spent + whole > target_s or done + m == max_steps:
            # smallest n with n * first + growth * n (n - 1) / 2 > rest
            rest = target_s - spent
            n = m
            if growth > 1e-18:
                b = first - 0.5 * growth
                n = int((math.sqrt(b * b + 2.0 * growth * max(rest, 0.0)) - b) / growth) + 1
            elif first > 0.0:
                n = int(rest / first) + 1
            n = max(1, min(n, m))
            while n < m and n * first + growth * (0.5 * n * (n - 1)) <= rest:
                n += 1
            while n > 1 and (n - 1) * first + growth * (0.5 * (n - 1) * (n - 2)) > rest:
                n -= 1
            return done + n
        spent += whole
        done += m
        kv += m * batch
        while j < last and kk[j + 1] <= kv:
            j += 1


@inlined
def step_factor(p: Params, s: State, e: int, r: int) -> float:
    """Factor on the grid's times for the replica's next step: noise over speed."""
    v = s.replica[e, r]
    factor = 1.0 / v.speed
    if p.noise_sigma > 0.0:
        window = (v.iteration + v.prefill_steps) // p.noise_period_steps
        z = step_noise_z(s.env[e].noise_seed, v.noise_stream, window)
        factor *= math.exp(p.noise_sigma * z - 0.5 * p.noise_sigma * p.noise_sigma)
    return factor
