"""What counts: a metric, its name in tables, which way is better, how two are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """What policies are judged by.

    Attributes:
        name: In scenario files.
        metric: Key of the metric.
        label: What tables and figures call the metric.
        more_is_better: Whether a larger metric is better.
        is_share: Whether it is a share, which can be 0: two are then compared by their difference
            in percentage points, else by their ratio.
        loss_form: How the average of `Episodes.losses` is told; more than the metric's own name
            where tuning takes a simpler quantity that goes with it.
        better: What a verdict calls it when a policy is clearly better than another.
        worse: The same for clearly worse.
    """

    name: str
    metric: str
    label: str
    more_is_better: bool = False
    is_share: bool = False
    loss_form: str = "{:.3f}"
    better: str = "better than"
    worse: str = "worse than"

    @property
    def heading(self) -> str:
        """Heading of a column of comparisons."""
        return "points" if self.is_share else "ratio"

    @property
    def relation(self) -> str:
        """How a comparison is read: a metric over, or minus, that of another policy."""
        return "minus" if self.is_share else "over"

    @property
    def neutral(self) -> float:
        """Comparison of a policy with itself."""
        return 0.0 if self.is_share else 1.0

    @property
    def factor(self) -> float:
        """On comparisons when they are shown: differences of shares are percentage points."""
        return 100.0 if self.is_share else 1.0

    @property
    def form(self) -> str:
        """Format of comparisons when they are shown."""
        return "+.1f" if self.is_share else ".3f"

    @property
    def sign(self) -> int:
        """Turns the metric into something where lower is better."""
        return -1 if self.more_is_better else 1

    def loss_text(self, loss: float) -> str:
        """Tell an average of `Episodes.losses` in words."""
        return self.loss_form.format(self.sign * loss)

    def verdict(self, low: float, high: float) -> str:
        """Say what the interval of a comparison with another policy means.

        Args:
            low: Lower bound.
            high: Upper bound, in the same unit as `neutral`.
        """
        above, below = low > self.neutral, high < self.neutral
        if not (above or below):
            return "not distinguishable from"
        return self.better if above == self.more_is_better else self.worse
