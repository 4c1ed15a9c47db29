"""The tokens of a table's requests: what shares a prefix in the simulator shares it in vLLM."""

from __future__ import annotations

import numpy as np

from servegym.typing import IntArray
from servegym.workloads.table import RequestTable

#: Of the tiny model; the paced executor makes no token below `LOW`.
VOCABULARY = 1024
LOW = VOCABULARY // 3


def answered(position: int | IntArray) -> int | IntArray:
    """Return the token that the paced executor puts at a position; see `StepReader`."""
    return LOW + position % (VOCABULARY - LOW)


def prompts(table: RequestTable, seed: int) -> list[list[int]]:
    """Return the prompt of each request, token by token.

    A later turn repeats what was said before: its prompt has the answers of the turns that it
    follows where they stood.
    """
    texts = []
    history: list[list[int]] = []  # of each request, the turns before it
    for request in range(len(table)):
        count = int(table.prompt_tokens[request])
        text = np.random.default_rng((seed, request)).integers(LOW, VOCABULARY, count)
        begin = 0
        rows = slice(*table.prefix_offsets[request : request + 2])
        for key, end in zip(table.prefix_keys[rows], table.prefix_ends[rows], strict=True):
            stop = min(int(end), count)
            same = np.random.default_rng((seed, int(key) % 2**63)).integers(LOW, VOCABULARY, stop)
            text[begin:stop] = same[begin:]
            begin = stop
        before = int(table.after[request])
        history.append([] if before < 0 else [*history[before], before])
        for turn in history[request]:
            start = int(table.prompt_tokens[turn])
            said = np.arange(start, min(start + int(table.output_tokens[turn]), count))
            text[said] = answered(said)
        texts.append(text.tolist())
    return texts
