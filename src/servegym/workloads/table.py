"""The request table: every request stream, read or generated, in one form."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from servegym.errors import WorkloadError
from servegym.typing import FloatArray, Int16Array, Int32Array, IntArray

#: In `RequestTable.after`: the request waits for nobody, or for the next end of any request.
BY_ITSELF, ANY_END = -1, -2


@dataclass(frozen=True)
class RequestTable:
    """Requests in order of arrival, as columns.

    The content of a request, as far as prefix caching can see it, is a list of *segments*: the
    tokens up to `prefix_ends[k]` (exclusive) belong to the text `prefix_keys[k]`. A key names the
    whole text from the beginning, so equal keys mean equal prefixes. Two requests share a KV
    block exactly if the segment of the block's last token has the same key in both. Segments may
    reach beyond the prompt into the output (a later turn repeats it). Tokens after the last
    segment belong to this request alone.

    Attributes:
        arrival_s: Seconds since the start of the stream, ascending, `float64[n]`.
        prompt_tokens: At least 1, `int32[n]`.
        output_tokens: At least 1; hidden from policies, `int32[n]`.
        predicted_output_tokens: What a length predictor says, at least 1, `float64[n]`.
        slo_class: Index into the scenario's SLO classes, `int16[n]`.
        tenant: Tenant number, `int32[n]`.
        session: Conversation number, -1 for none, `int32[n]`.
        after: Request whose end each one waits for, an earlier one in the table, `int32[n]`;
            `BY_ITSELF` if it waits for none; `ANY_END` if it is sent by whoever is free next: the
            k-th such request waits for the k-th end. An end is an answer or a rejection.
        delay_s: Seconds from that end to its arrival: thinking, or tools at work, `float64[n]`. The
            `arrival_s` of such a request is when it would arrive if nobody waited. A request by
            itself that has a delay followed one that is not in the table; see `num_cut`.
        tool: What runs from that end to its arrival, a number; -1 where nobody says it, `int16[n]`.
        prefix_offsets: Segments of request i are `prefix_offsets[i]:prefix_offsets[i+1]`,
            `int64[n+1]`.
        prefix_keys: Text of each segment, `int64[m]`.
        prefix_ends: End of each segment in tokens from the start of the prompt, ascending within
            a request, `int32[m]`.
    """

    arrival_s: FloatArray
    prompt_tokens: Int32Array
    output_tokens: Int32Array
    predicted_output_tokens: FloatArray
    slo_class: Int16Array
    tenant: Int32Array
    session: Int32Array
    after: Int32Array
    delay_s: FloatArray
    tool: Int16Array
    prefix_offsets: IntArray
    prefix_keys: IntArray
    prefix_ends: Int32Array

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        for field in fields(self):
            if field.name.startswith("prefix_"):
                continue
            if len(getattr(self, field.name)) != n:
                raise WorkloadError(
                    f"{field.name} has {len(getattr(self, field.name))} rows, not {n}"
                )
        if n == 0:
            raise WorkloadError("a workload needs at least one request, got none")
        if not np.isfinite(self.arrival_s).all() or (np.diff(self.arrival_s) < 0).any():
            raise WorkloadError("arrival_s must be finite and ascending")
        if self.arrival_s[0] < 0:
            raise WorkloadError(f"arrival_s must not be negative, got {self.arrival_s[0]}")
        for name in ("prompt_tokens", "output_tokens", "predicted_output_tokens"):
            values = getattr(self, name)
            if not (values >= 1).all():
                i = int(np.argmin(values >= 1))
                raise WorkloadError(f"{name} must be at least 1, got {values[i]} in request {i}")
        late = (self.after < ANY_END) | (self.after >= np.arange(n))
        if late.any():
            i = int(np.argmax(late))
            raise WorkloadError(
                f"after must be an earlier request, {BY_ITSELF} (by itself) or {ANY_END} (any "
                f"end), got {self.after[i]} in request {i}"
            )
        if self.after[0] == ANY_END:
            raise WorkloadError("the first request has no end to wait for: it must come by itself")
        if not (np.isfinite(self.delay_s) & (self.delay_s >= 0)).all():
            i = int(np.argmin(np.isfinite(self.delay_s) & (self.delay_s >= 0)))
            raise WorkloadError(
                f"delay_s must be finite and at least 0, got {self.delay_s[i]} in request {i}"
            )
        if len(self.prefix_offsets) != n + 1 or len(self.prefix_keys) != len(self.prefix_ends):
            raise WorkloadError("the prefix segments do not match the requests")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @classmethod
    def build(
        cls,
        arrival_s: FloatArray,
        prompt_tokens: IntArray | Int32Array,
        output_tokens: IntArray | Int32Array,
        *,
        slo_class: IntArray | Int16Array | None = None,
        tenant: IntArray | Int32Array | None = None,
        session: IntArray | Int32Array | None = None,
        after: IntArray | Int32Array | None = None,
        delay_s: FloatArray | None = None,
        tool: IntArray | Int16Array | None = None,
        predicted_output_tokens: FloatArray | None = None,
        prefix_offsets: IntArray | None = None,
        prefix_keys: IntArray | None = None,
        prefix_ends: IntArray | Int32Array | None = None,
    ) -> RequestTable:
        """Make a table from the columns at hand; what is left out gets its neutral value.

        Without predictions, the mean output length stands for every request: a predictor that
        knows only the average.
        """
        n = len(arrival_s)
        output = np.asarray(output_tokens, np.int32)
        if predicted_output_tokens is None:
            predicted_output_tokens = np.full(n, max(1.0, float(output.mean()) if n else 1.0))

        def column(values: object, default: int, dtype: type) -> object:
            return np.full(n, default, dtype) if values is None else np.asarray(values, dtype)

        return cls(
            arrival_s=np.ascontiguousarray(arrival_s, np.float64),
            prompt_tokens=np.asarray(prompt_tokens, np.int32),
            output_tokens=output,
            predicted_output_tokens=np.asarray(predicted_output_tokens, np.float64),
            slo_class=column(slo_class, 0, np.int16),  # type: ignore[arg-type]
            tenant=column(tenant, 0, np.int32),  # type: ignore[arg-type]
            session=column(session, -1, np.int32),  # type: ignore[arg-type]
            after=column(after, BY_ITSELF, np.int32),  # type: ignore[arg-type]
            delay_s=column(delay_s, 0, np.float64),  # type: ignore[arg-type]
            tool=column(tool, -1, np.int16),  # type: ignore[arg-type]
            prefix_offsets=np.zeros(n + 1, np.int64)
            if prefix_offsets is None
            else np.asarray(prefix_offsets, np.int64),
            prefix_keys=np.zeros(0, np.int64)
            if prefix_keys is None
            else np.asarray(prefix_keys, np.int64),
            prefix_ends=np.zeros(0, np.int32)
            if prefix_ends is None
            else np.asarray(prefix_ends, np.int32),
        )

    def take(self, rows: IntArray) -> RequestTable:
        """Return the given rows in their order, with arrivals unchanged; these must ascend.

        One that waits for a request that is left out arrives by itself, and so does the first.
        """
        counts = np.diff(self.prefix_offsets)[rows]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        starts = self.prefix_offsets[:-1][rows]
        segments = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
        per_request = {
            f.name: getattr(self, f.name)[rows]
            for f in fields(self)
            if not f.name.startswith("prefix_")
        }
        place = np.full(len(self), BY_ITSELF, np.int32)
        place[rows] = np.arange(len(rows), dtype=np.int32)
        after = per_request["after"]
        per_request["after"] = np.where(after < 0, after, place[after])
        per_request["after"][:1] = BY_ITSELF
        return RequestTable(
            **per_request,
            prefix_offsets=offsets.astype(np.int64),
            prefix_keys=self.prefix_keys[segments],
            prefix_ends=self.prefix_ends[segments],
        )

    def window(self, start_s: float, duration_s: float) -> RequestTable:
        """Return the requests that arrive in `[start_s, start_s + duration_s)`, shifted to 0."""
        first, last = np.searchsorted(self.arrival_s, (start_s, start_s + duration_s))
        if first == last:
            raise WorkloadError(
                f"no request arrives between {start_s:g} s and {start_s + duration_s:g} s; "
                f"the stream has arrivals from {self.arrival_s[0]:g} s to {self.arrival_s[-1]:g} s"
            )
        part = self.take(np.arange(first, last))
        return replace(part, arrival_s=part.arrival_s - start_s)

    def scaled(self, rate_factor: float) -> RequestTable:
        """Return the same requests arriving `rate_factor` times as fast; delays stay.

        So do the distances of those who wait for a request from the first of their chain: what
        waits for nobody comes faster. See `order_at`, in which the requests then are.
        """
        order, arrival_s = self.order_at(rate_factor)
        if order is None:
            return replace(self, arrival_s=arrival_s)
        even = replace(self, arrival_s=np.zeros(len(self)))
        return replace(even.take(order), arrival_s=arrival_s[order])

    def order_at(self, rate_factor: float) -> tuple[IntArray | None, FloatArray]:
        """Return the order of arrival at `rate_factor` times the rate, None for the same, and when.

        Returns:
            Rows in order, `int64[n]`, and the arrival of each row of this table, `float64[n]`.

        Raises:
            WorkloadError: If `rate_factor` is impossible.
        """
        if not (np.isfinite(rate_factor) and rate_factor > 0):
            raise WorkloadError(f"rate_factor must be above 0, got {rate_factor}")
        if not (self.after >= 0).any():
            return None, self.arrival_s / rate_factor
        first = self.first_of_chain
        start_s = self.arrival_s[first]
        arrival_s = start_s / rate_factor + (self.arrival_s - start_s)
        return np.argsort(arrival_s, kind="stable"), arrival_s

    @property
    def first_of_chain(self) -> IntArray:
        """Request that waits for none at which the chain of each one begins, `int64[n]`."""
        first = np.where(self.after >= 0, self.after, np.arange(len(self)))
        while True:
            further = first[first]
            if (further == first).all():
                return first
            first = further

    def open_loop(self) -> RequestTable:
        """Return the same requests, none of which waits for another."""
        nobody = np.full(len(self), BY_ITSELF, np.int32)
        return replace(self, after=nobody, delay_s=np.zeros(len(self)))

    @property
    def num_waiting(self) -> int:
        """Requests that wait for an end."""
        return int((self.after != BY_ITSELF).sum())

    @property
    def num_cut(self) -> int:
        """Requests that come by themselves because what they waited for is not in the table."""
        return int(((self.after == BY_ITSELF) & (self.delay_s > 0.0)).sum())

    @cached_property
    def conversation(self) -> IntArray:
        """Number of each request's conversation, from 0; a request without is one of its own."""
        alone = np.arange(len(self))
        owner = np.where(self.session < 0, alone, len(self) + self.session.astype(np.int64))
        return np.unique(owner, return_inverse=True)[1]

    @property
    def rate_rps(self) -> float:
        """Mean arrival rate in requests per second over the span of the stream.

        Where some wait for others, the rate at which the others arrive, times how many requests
        each of these brings: what comes about in the long run.
        """
        alone = self.arrival_s[self.after < 0]
        span = float(alone[-1] - alone[0])
        if span <= 0:
            return float("inf")
        return (len(alone) - 1) / span * (len(self) / len(alone))
