"""Requests beyond the longest context: refused, or cut or left out and counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from servegym.errors import WorkloadError
from servegym.typing import BoolArray, IntArray
from servegym.workloads.waiting import with_followers

#: What happens to requests beyond the longest context: the file is refused, or they are counted
#: and cut, as a client would, or left out, as a server would.
TooLong = Literal["error", "cut", "skip"]


class Shortened(NamedTuple):
    """What became of requests beyond the longest context.

    Attributes:
        how: They were cut to it, or left out.
        max_context_tokens: The longest prompt and output together.
        num_requests: How many they are.
        num_tokens: What was cut off them or left out with them.
        of_requests: All that the file has.
        of_tokens: Likewise.
        waited: Whether some were left out only because they wait for one that was.
    """

    how: TooLong
    max_context_tokens: int
    num_requests: int
    num_tokens: int
    of_requests: int
    of_tokens: int
    waited: bool = False

    @property
    def sentence(self) -> str:
        """What was done, with counts."""
        done = "cut" if self.how == "cut" else "left out"
        who = "they or those they wait for" if self.waited else "they"
        return (
            f"{done} {self.num_requests:,} of {self.of_requests:,} requests, as {who} exceed"
            f" {self.max_context_tokens:,} tokens: {self.num_tokens / self.of_tokens:.1%} of all"
            " tokens are not played"
        )


class Within(NamedTuple):
    """Lengths within the longest context.

    Attributes:
        prompt_tokens: Of the requests kept, `int64[k]`.
        output_tokens: Likewise.
        kept: Which of the requests those are, `bool[n]`.
        shortened: What was done, None if nothing was.
    """

    prompt_tokens: IntArray
    output_tokens: IntArray
    kept: BoolArray
    shortened: Shortened | None


def within(
    prompt_tokens: IntArray,
    output_tokens: IntArray,
    places: Sequence[str],
    limit: int | None,
    too_long: TooLong,
    *,
    after: IntArray | None = None,
) -> Within:
    """Refuse, cut or leave out the requests beyond a limit.

    A request is cut at its output first, to half the limit, then at its prompt. Whoever waits for
    one that is left out is left out, too.

    Args:
        prompt_tokens: `int64[n]`.
        output_tokens: `int64[n]`.
        places: File and line of each, for messages.
        limit: Most tokens of prompt and output together; None: no limit.
        too_long: What to do.
        after: Earlier request that each one waits for, negative for none, `int64[n]`; None: nobody
            waits.

    Raises:
        WorkloadError: If one exceeds it and is neither to be cut nor left out, or none is left.
    """
    total = prompt_tokens + output_tokens
    over = total > (np.inf if limit is None else limit)
    if limit is None or not over.any():
        return Within(prompt_tokens, output_tokens, ~over, None)
    count, tokens = int(over.sum()), int(total.sum())
    row = int(np.argmax(over))
    if too_long == "error":
        beyond = int((total[over] - limit).sum())
        raise WorkloadError(
            f"{places[row]}: a prompt of {prompt_tokens[row]:,} and an output of"
            f" {output_tokens[row]:,} tokens exceed {limit:,}, the longest context here;"
            f" {count:,} of {len(total):,} requests do, by {beyond:,} tokens or"
            f" {beyond / tokens:.2g} of all: take larger replicas or raise max_context_tokens"
            " (--max-context-tokens), or say too_long (--too-long) cut or skip"
        )
    if too_long == "skip":
        out = over if after is None else with_followers(over, after)
        left = int(out.sum())
        if out.all():
            raise WorkloadError(
                f"{places[row]}, as all others"
                f"{'' if left == count else ' or those that they wait for'}, exceeds {limit:,}"
                " tokens, the longest context here: take larger replicas or raise"
                " max_context_tokens"
            )
        lost = int(total[out].sum())
        done = Shortened(too_long, limit, left, lost, len(total), tokens, left > count)
        return Within(prompt_tokens[~out], output_tokens[~out], ~out, done)
    output = np.where(over, np.minimum(output_tokens, max(1, limit // 2)), output_tokens)
    prompt = np.where(over, np.minimum(prompt_tokens, limit - output), prompt_tokens)
    done = Shortened(
        too_long, limit, count, tokens - int((prompt + output).sum()), len(total), tokens
    )
    return Within(prompt, output, np.ones(len(total), np.bool_), done)
