"""Replicas left alone for what became of requests there, whatever their health checks say.

A request that fails everywhere says something about itself, not about replicas: a failure counts
only where another replica has answered the same request well, and then as a share of the replica's
latest requests, compared with the rest of the fleet. A replica that owes tokens and sends none is
out until it sends one. After an ejection one request at a time is sent there; only an answer brings
the rest back.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from servegym.serve.router.config import HealthConfig

_log = logging.getLogger(__name__)

#: Seconds that a replica is passed over that says it is full and not for how long.
_BUSY_S = 1.0


@dataclass(slots=True, eq=False)
class Standing:
    """What requests have shown of one replica.

    Attributes:
        outcomes: Of its latest requests.
        ejected_until_s: None are sent there before.
        num_ejections: How often it was ejected.
        silent: Whether it owes tokens and sends none.
        on_trial: Whether it has to prove itself, with one request at a time.
        last_token_s: When a token or a whole answer last came from it; whoever passes tokens on
            writes it.
    """

    outcomes: deque[tuple[float, bool]]  # when; whether it failed
    ejected_until_s: float = -math.inf
    eject_s: float = 0.0  # of the last ejection; 0 once a whole answer has come since
    num_ejections: int = 0
    busy_until_s: float = -math.inf
    silent: bool = False
    on_trial: bool = False
    hung: bool = False  # what it was ejected for: not saying anything
    trial: Attempt | None = None
    since_s: float = -math.inf  # failures of requests sent before are old news
    last_token_s: float = -math.inf
    owed_since_s: float = math.inf
    streams: int = 0  # in progress
    owing: int = 0  # of them, those that wait for the replica and not for their client
    begun: int = 0  # of them, with a token
    wholes: int = 0  # answers not streamed, in progress

    def rate(self, oldest_s: float) -> float | None:
        """Share of its latest requests that failed; `None` if there was none."""
        while self.outcomes and self.outcomes[0][0] < oldest_s:
            self.outcomes.popleft()
        if not self.outcomes:
            return None
        return self.num_failed / len(self.outcomes)

    @property
    def idle(self) -> bool:
        """Whether it has no request."""
        return not self.streams and not self.wholes

    @property
    def num_failed(self) -> int:
        """How many of its latest requests failed."""
        return sum(failed for _, failed in self.outcomes)


@dataclass(slots=True, eq=False)
class Attempt:
    """One request at one replica, from its dispatch to its end.

    Attributes:
        replica: Its slot.
        standing: Of the replica.
        stream: Whether its tokens are passed on as they come.
        dispatch_s: When it was sent there.
        is_trial: Whether the replica is to prove itself with it.
    """

    replica: int
    standing: Standing
    stream: bool
    dispatch_s: float
    is_trial: bool = False
    begun: bool = False
    owed: bool = False
    ended: bool = False

    def waits(self, now_s: float) -> None:
        """It waits for the replica from now on."""
        standing = self.standing
        if not standing.owing:
            standing.owed_since_s = now_s
        standing.owing += not self.owed
        self.owed = True

    def has_got(self, now_s: float) -> None:
        """The replica has sent tokens; until it `waits` again, it waits for its client."""
        self.standing.last_token_s = now_s
        self.standing.owing -= self.owed
        self.owed = False

    @property
    def replica_has_moved(self) -> bool:
        """Whether the replica has sent anything of any request since this one was sent there."""
        return self.standing.last_token_s > self.dispatch_s


class Ejection:
    """Keeps the standing of every replica.

    Args:
        config: When one is ejected.
        names: Of the replicas, by slot.
        clock: Seconds that never go back.
        peers: Replicas that are up by their checks and could take a replica's requests, itself
            included, by slot.
        changed: Called when who is out may have changed.

    Attributes:
        standings: By slot.
    """

    def __init__(
        self,
        config: HealthConfig,
        names: Sequence[str],
        clock: Callable[[], float],
        peers: Callable[[int], list[int]],
        changed: Callable[[], None],
    ) -> None:
        self.config = config
        self.standings: dict[int, Standing] = {}
        self._names = names
        self._clock = clock
        self._peers = peers
        self._changed = changed

    def add(self, replica: int) -> None:
        """A replica has joined, of which requests have shown nothing."""
        window = max(self.config.window_requests, self.config.eject_after)
        self.standings[replica] = Standing(deque(maxlen=window))

    def remove(self, replica: int) -> None:
        """A replica has gone, after its last request."""
        del self.standings[replica]

    def begin(self, replica: int, *, stream: bool) -> Attempt:
        """A request is sent to a replica; every attempt must `end`."""
        standing, now_s = self.standings[replica], self._clock()
        attempt = Attempt(replica, standing, stream, now_s)
        if stream:
            standing.streams += 1
            attempt.waits(now_s)
        else:
            standing.wholes += 1
        if standing.on_trial and standing.trial is None:
            attempt.is_trial = True
            standing.trial = attempt
            self._changed()
        return attempt

    def first_token(self, attempt: Attempt) -> None:
        """A replica has answered: a stream has its first token, or all of another answer came."""
        standing, now_s = attempt.standing, self._clock()
        attempt.has_got(now_s)
        standing.outcomes.append((now_s, False))
        if attempt.stream:
            attempt.begun = True
            standing.begun += 1
        if standing.on_trial:
            _log.info("%s answers again: it is back", self._names[attempt.replica])
            standing.on_trial, standing.trial, standing.since_s = False, None, now_s
            standing.outcomes.clear()
            self._changed()

    def whole(self, attempt: Attempt) -> None:
        """An answer has come to its end."""
        attempt.standing.last_token_s = self._clock()
        if attempt.dispatch_s >= attempt.standing.since_s:
            attempt.standing.eject_s = 0.0

    def end(self, attempt: Attempt) -> None:
        """A request has left a replica; does nothing the second time."""
        if attempt.ended:
            return
        attempt.ended = True
        standing = attempt.standing
        if attempt.stream:
            standing.streams -= 1
            standing.begun -= attempt.begun
        else:
            standing.wholes -= 1
        standing.owing -= attempt.owed
        attempt.owed = False
        if standing.trial is attempt:
            standing.trial = None  # no verdict: the next one
            self._changed()

    def failed(self, attempt: Attempt, *, hung: bool = False) -> None:
        """A replica has failed a request that is known to be good.

        Args:
            attempt: The request there.
            hung: It said nothing at all; else it said that it failed, or broke off.
        """
        standing, now_s = attempt.standing, self._clock()
        if self.standings.get(attempt.replica) is not standing:
            return  # it has gone since, and another may have its slot
        if attempt.dispatch_s < standing.since_s or now_s < standing.ejected_until_s:
            return
        standing.outcomes.append((now_s, True))
        if standing.eject_s > 0.0 or self._is_outlier(attempt.replica, now_s):
            self._eject(attempt.replica, now_s, "fails requests that others answer", hung=hung)

    def busy(self, replica: int, retry_after_s: float | None) -> None:
        """A replica has said that it is full."""
        standing = self.standings[replica]
        left_s = _BUSY_S if retry_after_s is None else retry_after_s
        standing.busy_until_s = self._clock() + min(left_s, self.config.max_busy_s)

    def passed_over(self, *, stream: bool) -> list[int]:
        """Replicas that should not get a request if another can: full, or likely not to answer."""
        now_s = self._clock()
        return [
            r
            for r, standing in self.standings.items()
            if now_s < standing.busy_until_s or (standing.on_trial and standing.hung and not stream)
        ]

    @property
    def trial_s(self) -> float:
        """How long a stream on trial may take to its first token."""
        return 2.0 * self.config.silent_after_s

    def look(self) -> None:
        """Find replicas that owe tokens and send none, and those that do again."""
        now_s = self._clock()
        for r, standing in self.standings.items():
            if standing.silent:
                if standing.last_token_s > standing.since_s:
                    _log.info("%s sends tokens again: it is back", self._names[r])
                    standing.silent, standing.eject_s = False, 0.0
                    standing.ejected_until_s = -math.inf
                    self._changed()
                elif not standing.streams:
                    standing.silent = False
                    self._try_again(r, now_s)
            elif self._is_silent(standing, now_s):
                standing.silent = True
                self._eject(
                    r, now_s, f"has sent no token for {self.config.silent_after_s:g} s", hung=True
                )
            else:
                self._try_again(r, now_s)

    def out(self, now_s: float) -> list[int]:
        """Replicas that should get no new requests, the worst first."""
        found = [
            (standing.silent, standing.eject_s, r)
            for r, standing in self.standings.items()
            if standing.silent or standing.trial is not None or now_s < standing.ejected_until_s
        ]
        return [r for *_, r in sorted(found, reverse=True)]

    def may_be_out(self, num_out: int, num_peers: int) -> bool:
        """Whether one more of a group of replicas may be out."""
        share = self.config.max_ejected_share
        most = max(math.floor(share * num_peers), 1 if share > 0.0 and num_peers > 1 else 0)
        return num_out < most

    def _is_silent(self, standing: Standing, now_s: float) -> bool:
        if not standing.owing or (standing.wholes and not standing.begun):
            # what is not streamed may keep an engine busy without a word
            return False
        since_s = max(standing.last_token_s, standing.owed_since_s)
        return now_s - since_s >= self.config.silent_after_s

    def _is_outlier(self, replica: int, now_s: float) -> bool:
        oldest_s = now_s - self.config.window_s
        standing = self.standings[replica]
        mine = standing.rate(oldest_s) or 0.0
        if standing.num_failed < self.config.eject_after:
            return False
        rates = [self.standings[p].rate(oldest_s) for p in self._peers(replica) if p != replica]
        known = [rate for rate in rates if rate is not None]
        return mine - (statistics.median_low(known) if known else 0.0) >= self.config.eject_rate

    def _eject(self, replica: int, now_s: float, why: str, *, hung: bool) -> None:
        standing, config = self.standings[replica], self.config
        standing.eject_s = min(max(config.eject_s, 2.0 * standing.eject_s), config.max_eject_s)
        standing.ejected_until_s = now_s + standing.eject_s
        standing.since_s = now_s
        standing.num_ejections += 1
        standing.on_trial, standing.trial, standing.hung = False, None, hung
        standing.outcomes.clear()
        _log.warning(
            "%s %s: left alone for %g s, if others can do without",
            self._names[replica],
            why,
            standing.eject_s,
        )
        self._changed()

    def _try_again(self, replica: int, now_s: float) -> None:
        """Put a replica whose ejection is over on trial."""
        standing = self.standings[replica]
        if standing.ejected_until_s > -math.inf and now_s >= standing.ejected_until_s:
            standing.ejected_until_s = -math.inf
            standing.on_trial, standing.since_s = True, now_s
            if standing.streams:  # those from before owe nothing new
                standing.owed_since_s = now_s
            self._changed()
