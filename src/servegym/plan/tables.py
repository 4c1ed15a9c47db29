"""The tables and sentences of an answer, for terminal and page."""

from __future__ import annotations

from servegym.plan.answer import Answer, Candidate
from servegym.validate.tables import TextTable


def verdict(result: Answer) -> str:
    """Say in a sentence which fleet it is."""
    asked = result.question
    limits = (
        f"{asked.attainment:.4g} of {result.num_requests:,} requests within TTFT {asked.ttft_s:g} "
        f"s and TPOT {asked.tpot_s:g} s"
    )
    if result.best is None:
        budget = asked.max_usd_per_h
        within = f" for ${budget:g} an hour" if budget is not None else ""
        return (
            f"No fleet of up to {asked.max_replicas} replicas{within} keeps {limits}: allow longer "
            "limits, other GPUs or more of them"
        )
    best = result.best
    sure = ""
    if best.certainty is not None:
        sure = f"; it holds in {_worlds(best)} worlds with other kernels and engines"
    return (
        f"The cheapest fleet found that keeps {limits}: {best.name} under {best.trial.rule}, "
        f"${best.usd_per_h:,.2f} an hour{sure}"
    )


def safety(result: Answer) -> list[str]:
    """Say which fleet is safe, if that was asked."""
    if result.best is None or result.best.certainty is None:
        return []
    if result.safe is None:
        lost = result.best.certainty
        return [
            "No fleet of up to four more replicas was found that holds in nine of ten worlds: of "
            f"{lost.asked}, the first token of the answer's alone comes too late in "
            f"{lost.late_first}, the others in {lost.slow}"
        ]
    safe = result.safe
    more = safe.usd_per_h / result.best.usd_per_h - 1.0
    return [
        f"The cheapest found that holds in nine of ten worlds: {safe.name} under "
        f"{safe.trial.rule}, ${safe.usd_per_h:,.2f} an hour, {more:.1%} more; it holds in "
        f"{_worlds(safe)}"
    ]


def _worlds(one: Candidate) -> str:
    found = one.certainty
    return f"{found.held} of {found.asked}" if found is not None else "-"


def fleets_table(result: Answer) -> TextTable:
    """The answer, the next best and those that just fail."""
    asked = result.question
    share = f"{100 * asked.attainment:.4g} %"
    best = [result.best] if result.best is not None else []
    return TextTable(
        "Fleets on the whole trace",
        (
            *("fleet", "rule", "$/h", "in time %"),
            *(f"TTFT s, {share} below", f"TPOT ms, {share} below", "worlds"),
        ),
        [_row(one) for one in [*best, *result.others]],
        "The first is the answer." if best else "",
    )


def effort(result: Answer) -> str:
    """Say how many simulations there were, and what took how long."""
    parts = ", ".join(f"{text} {seconds:.0f} s" for text, seconds in result.seconds.items())
    return f"{result.num_trials:,} simulations in {sum(result.seconds.values()):.0f} s: {parts}"


def _row(one: Candidate) -> tuple[str, ...]:
    trial = one.trial
    return (
        one.name,
        trial.rule,
        f"{one.usd_per_h:,.2f}",
        f"{100 * trial.attainment:.2f}",
        f"{trial.ttft_s:.3f}",
        f"{1e3 * trial.tpot_s:.1f}",
        _worlds(one),
    )


def reasons(result: Answer) -> list[str]:
    """Say of each other fleet why it is not the answer."""
    return [f"{one.name}, ${one.usd_per_h:,.2f}: {one.why}" for one in result.others]


def remarks(result: Answer) -> list[str]:
    """Say what was left out, and where prices come from."""
    gone = [f"left out: {one.name}: {one.why}" for one in result.left_out]
    rents = [
        f"price of {name}: ${price.usd_per_h:g} an hour and GPU ({price.source})"
        for name, price in result.prices.items()
    ]
    return [*gone, *rents]
