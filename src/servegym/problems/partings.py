"""Where a learned policy parts from the best rule, and what it has of that: figure and sentences.

The learned policy plays an episode; at each decision the rule is asked, too. Where they differ, a
teacher that tries both on the state as it is (`policy.counterfactual`) says what the one brings
beyond the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.cluster.state import DONE
from servegym.drawing import PALETTE, as_image, pyplot
from servegym.policy.contract import OUTSTANDING_REQUESTS, PREDICTED_OUTPUT_TOKENS, PROMPT_TOKENS
from servegym.policy.counterfactual import Teacher, worth_of
from servegym.policy.drawn_lengths import learn_lengths
from servegym.policy.observe import observe_batch
from servegym.policy.policy import Policy
from servegym.problems.problem import Section
from servegym.scenario import Scenario
from servegym.typing import FloatArray, IntArray

#: Futures over which both choices are tried.
_NUM_SAMPLES = 8
_NUM_GROUPS = 5
_HOLD, _REJECT = "held", "rejected"


@dataclass(frozen=True)
class Partings:
    """Decisions of an episode, n of them.

    Attributes:
        learned: Name of the policy that played.
        rule: Name of the rule that was asked, too.
        in_time: Whether gains are requests within their limits, else seconds.
        kinds: What an action does, for each of `R + 2`: a replica's type, held or rejected.
        taken: What the learned policy did, `int64[n]`.
        asked: What the rule would have done, `int64[n]`.
        gain: What the one brings beyond the other as the teacher sees it, `float64[n]`: seconds
            that are not added to somebody's time; 0 where they agree.
        outstanding: Requests at each replica, `float64[n, R]`.
        predicted_tokens: Of the request, `float64[n]`.
        prompt_tokens: Of the request, `float64[n]`.
    """

    learned: str
    rule: str
    in_time: bool
    kinds: tuple[str, ...]
    taken: IntArray
    asked: IntArray
    gain: FloatArray
    outstanding: FloatArray
    predicted_tokens: FloatArray
    prompt_tokens: FloatArray


def find_partings(
    scenario: Scenario, learned: Policy, rule: Policy, episode: Episode, seed: int = 0
) -> Partings:
    """Let a learned policy play an episode, and ask a rule at each of its decisions.

    Args:
        scenario: What is played.
        learned: Plays.
        rule: Is asked.
        episode: One of the scenario's.
        seed: Of the policies' own randomness.
    """
    simulator = Simulator(scenario.spec, [episode])
    worth = worth_of(scenario.objective)._replace(num_samples=_NUM_SAMPLES)
    teacher = Teacher(learn_lengths(scenario), worth)
    for policy in (learned, rule):
        policy.reset(1, seed)
    taken: list[int] = []
    asked: list[int] = []
    gain: list[float] = []
    outstanding: list[FloatArray] = []
    request: list[FloatArray] = []
    while simulator.advance()[0] != DONE:
        observations, envs = observe_batch(simulator, learned.needs | rule.needs)
        mine = learned.act(observations, envs)
        other = int(rule.act(observations, envs)[0])
        difference = 0.0
        if mine[0] != other:
            values = teacher.values(simulator, envs, len(taken))[0]
            difference = float(values[mine[0]] - values[other])
        taken.append(int(mine[0]))
        asked.append(other)
        gain.append(difference)
        outstanding.append(observations.replicas[0, OUTSTANDING_REQUESTS].copy())
        request.append(observations.request[0].copy())
        simulator.apply(mine)
    types = [scenario.spec.types[t].name for t in episode.type_idx]
    requests = np.array(request)
    return Partings(
        learned=learned.name,
        rule=rule.name,
        in_time=scenario.objective == "goodput",
        kinds=(*types, _HOLD, _REJECT),
        taken=np.array(taken),
        asked=np.array(asked),
        gain=np.array(gain),
        outstanding=np.array(outstanding),
        predicted_tokens=requests[:, PREDICTED_OUTPUT_TOKENS],
        prompt_tokens=requests[:, PROMPT_TOKENS],
    )


def partings_section(found: Partings) -> Section:
    """Return sentences and a figure."""
    return Section(
        title=f"What {found.learned} does otherwise than {found.rule}",
        sentences=sentences(found),
        figure=_figure(found) if _parted(found).any() else "",
        note="The learned policy plays the first episode, and the rule is asked at each of its"
        " decisions. The gain is what both choices do to those who are there, tried on the state as"
        " it is over the same likely output lengths, and without any that arrive later.",
    )


def sentences(found: Partings) -> list[str]:
    """Say in what a learned policy differs, from the data."""
    parted = _parted(found)
    share = parted.mean()
    said = [
        f"In {share:.0%} of {len(parted):,} decisions of the first episode {found.learned} does not"
        f" do what {found.rule} would have done in the same state."
    ]
    if not parted.any():
        return said
    gain = found.gain[parted]
    size, is_gain = abs(float(gain.mean())), gain.mean() >= 0
    if found.in_time:
        much = f"{size:.3g} requests within their limits {'more' if is_gain else 'fewer'}"
        what = f"brings {much} than the rule's"
    else:
        much = f"{'saves' if is_gain else 'costs'} all requests together {size:.3g} s"
        what = f"{much} beside the rule's"
    said.append(
        f"Tried on copies of these states, its choice {what} in the mean; it is the better one of"
        f" the two in {(gain > 0).mean():.0%} of them."
    )
    said.append(f"Where they part, it chooses {_by_kind(found, parted)}.")
    there = _there(found, parted)
    if len(there):
        mine, others = there.mean(0)
        said.append(
            f"The replica that it prefers then has {mine:.1f} requests in the mean, the rule's"
            f" {others:.1f}."
        )
    for name, values in (
        ("predicted output", found.predicted_tokens),
        ("prompt", found.prompt_tokens),
    ):
        groups = _groups(values)
        shares = [parted[g].mean() for g in groups]
        most, least = int(np.argmax(shares)), int(np.argmin(shares))
        if shares[most] > 1.2 * shares[least]:
            said.append(
                f"By {name} it parts most often at {_span(values[groups[most]])} tokens"
                f" ({shares[most]:.0%} of such requests), least often at"
                f" {_span(values[groups[least]])} ({shares[least]:.0%})."
            )
    return said


def _parted(found: Partings) -> np.ndarray:
    return found.taken != found.asked


def _shares(found: Partings, actions: IntArray) -> dict[str, float]:
    """Share of the actions by what they do, in the order of the fleet."""
    kinds = np.array(found.kinds)[actions]
    return {
        kind: float((kinds == kind).mean()) for kind in dict.fromkeys(found.kinds) if len(kinds)
    }


def _by_kind(found: Partings, parted: np.ndarray) -> str:
    mine, others = (_shares(found, x[parted]) for x in (found.taken, found.asked))
    shown = [kind for kind in mine if mine[kind] > 0 or others[kind] > 0]
    return ", ".join(f"{kind} in {mine[kind]:.0%} (the rule: {others[kind]:.0%})" for kind in shown)


def _there(found: Partings, parted: np.ndarray) -> FloatArray:
    """Requests at the replica taken and at the rule's, where both took one, `float64[n, 2]`."""
    width = found.outstanding.shape[1]
    both = np.flatnonzero(parted & (found.taken < width) & (found.asked < width))
    sides = (found.taken[both], found.asked[both])
    return np.stack([found.outstanding[both, side] for side in sides], 1)


def _groups(values: FloatArray) -> list[IntArray]:
    """Decisions in groups of about equal size, from small to large values."""
    return [g for g in np.array_split(np.argsort(values, kind="stable"), _NUM_GROUPS) if len(g)]


def _span(values: FloatArray) -> str:
    return f"{values.min():,.0f} to {values.max():,.0f}"


def _figure(found: Partings) -> str:
    plt = pyplot()
    parted = _parted(found)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    mine, others = (_shares(found, x[parted]) for x in (found.taken, found.asked))
    shown = [kind for kind in mine if mine[kind] > 0 or others[kind] > 0]
    place = np.arange(len(shown))
    for shift, shares, color, label in (
        (-0.2, mine, PALETTE[1], found.learned),
        (0.2, others, PALETTE[0], found.rule),
    ):
        axes[0].bar(place + shift, [shares[kind] for kind in shown], 0.4, color=color, label=label)
    axes[0].set(
        xticks=place, xticklabels=shown, ylabel="share of partings", title="What is chosen instead"
    )
    axes[0].tick_params(axis="x", labelrotation=20, labelsize=8)
    axes[0].legend(fontsize=8)
    there = _there(found, parted)
    axes[1].plot(there[:, 1], there[:, 0], ".", color=PALETTE[1], markersize=3, alpha=0.4)
    top = float(there.max()) if len(there) else 1.0
    axes[1].plot([0, top], [0, top], color="gray", linewidth=1)
    axes[1].set(
        xlabel=f"requests at the replica of {found.rule}",
        ylabel=f"at that of {found.learned}",
        title="How full they are",
    )
    groups = _groups(found.predicted_tokens)
    labels = [_span(found.predicted_tokens[g]) for g in groups]
    gains = [found.gain[g].sum() / len(g) for g in groups]
    axes[2].bar(range(len(groups)), gains, color=PALETTE[2])
    axes[2].set(
        xticks=range(len(groups)),
        xticklabels=labels,
        xlabel="predicted output, tokens",
        ylabel="in time, requests" if found.in_time else "s a decision",
        title="Gain as the teacher sees it",
    )
    axes[2].tick_params(axis="x", labelrotation=20, labelsize=8)
    figure.tight_layout()
    return as_image(figure, f"Where {found.learned} parts from {found.rule}")
