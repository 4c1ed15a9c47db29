"""What a prediction says about an output's length, when the predictor's errors are known.

From pairs of a prediction and the length that came true, whatever predictor made them: pairs with
predictions of about the same size are kept together, as ratios of the length to the prediction. The
length of another request is then as likely one as another of its prediction's ratios says, among
those that are longer than what it has already put out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import inlined
from servegym.scenario import Scenario
from servegym.typing import FloatArray

#: Seeds of the episodes that lengths are learned from: those of nobody else.
FIRST_SEED = 200_000
_NUM_BINS = 32
_NUM_PAIRS = 32_768


class Lengths(NamedTuple):
    """Lengths given predictions; B bins of predictions, N equally likely ratios in each."""

    edges: FloatArray  # [B - 1] predictions, tokens, at which the next bin begins; ascending
    ratios: FloatArray  # [B, N] length over prediction, ascending


def lengths_of(predicted_tokens: FloatArray, output_tokens: FloatArray) -> Lengths:
    """Learn from requests that have ended.

    Args:
        predicted_tokens: `float64[n]`, at least 1.
        output_tokens: What came true, `float64[n]`.
    """
    num_bins = max(1, min(_NUM_BINS, len(predicted_tokens) // 64))
    each = len(predicted_tokens) // num_bins
    order = np.argsort(predicted_tokens, kind="stable")[: num_bins * each]
    predicted = predicted_tokens[order].reshape(num_bins, each)
    ratios = np.sort(output_tokens[order].reshape(num_bins, each) / predicted, axis=1)
    return Lengths(np.ascontiguousarray(predicted[1:, 0]), ratios)


def learn_lengths(scenario: Scenario) -> Lengths:
    """Learn from episodes of a scenario that nobody trains or is judged on."""
    predicted: list[FloatArray] = []
    output: list[FloatArray] = []
    seed = FIRST_SEED
    while sum(map(len, predicted)) < _NUM_PAIRS:
        table = scenario.episode(seed).table
        predicted.append(table.predicted_output_tokens)
        output.append(table.output_tokens.astype(np.float64))
        seed += 1
    return lengths_of(np.concatenate(predicted), np.concatenate(output))


@inlined
def draw_output(lengths: Lengths, predicted: float, generated: int, u: float) -> int:
    """Draw an output's length in tokens.

    Args:
        lengths: What is known of predictions.
        predicted: What was predicted, tokens.
        generated: Tokens that are out; the answer is above it.
        u: Which of the possible lengths, from the shortest at 0 to the longest at 1.
    """
    low, high = 0, lengths.edges.shape[0]
    while low < high:
        middle = (low + high) // 2
        if lengths.edges[middle] <= predicted:
            low = middle + 1
        else:
            high = middle
    ratios = lengths.ratios[low]
    first, high = 0, ratios.shape[0]
    while first < high:
        middle = (first + high) // 2
        if ratios[middle] * predicted < generated + 0.5:
            first = middle + 1
        else:
            high = middle
    if first == ratios.shape[0]:  # longer than any that was seen
        return generated + 1
    place = first + int(u * (ratios.shape[0] - first))
    return max(generated + 1, int(np.round(ratios[place] * predicted)))
