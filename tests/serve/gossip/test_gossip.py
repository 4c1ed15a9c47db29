"""Routers that know of each other; datagrams go from hand to hand, on clocks that are set."""

import numpy as np
import pytest

from servegym.policy.contract import (
    ARRIVAL_RATE_RPS,
    NUM_HELD,
    OUTSTANDING_PROMPT_TOKENS,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
)
from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Rates, fleet_facts, replica_facts
from servegym.serve.gossip.config import PeersConfig
from servegym.serve.gossip.gossip import Gossip
from servegym.serve.monitoring.prometheus import Exposition
from servegym.serve.requests.prompt import Size

FACTS = Rates(prefill_tokens_per_s=1000.0, decode_step_s=0.01)


class Clock:
    def __init__(self, now_s):
        self.now_s = now_s

    def __call__(self):
        return self.now_s


class One:
    """A router without a network: its dispatcher, its clock and its gossip."""

    def __init__(self, number, others, replicas=("a", "b"), start_s=0.0):
        self.address = ("127.0.0.1", number)
        self.clock = Clock(start_s)
        config = DispatchConfig.model_validate(
            {"runtime": {"policy": "least-outstanding"}, "seed": 0}
        )
        facts = fleet_facts([FACTS] * len(replicas))
        self.dispatcher = Dispatcher(config, replicas, facts, self.clock)
        addresses = tuple(f"127.0.0.1:{other}" for other in others)
        self.gossip = Gossip(PeersConfig(addresses=addresses), self.dispatcher)
        self.gossip.meet({("127.0.0.1", other) for other in others})

    @property
    def state(self):
        return self.dispatcher.state

    def request(self, tokens=100):
        job = self.dispatcher.arrive(range(tokens), key="k")
        return job, self.dispatcher.decide(job).action


def pair(**settings):
    """Two routers whose clocks have nothing in common."""
    return One(1, [2], **settings), One(2, [1], start_s=5e6, **settings)


def pass_on(*routers, lost=lambda data: False):
    """Let each tell the others once; return what was sent."""
    sent = []
    for router in routers:
        for data, address in router.gossip.tell():
            sent.append((data, router.address, address))
            for other in routers:
                if other.address == address and not lost(data):
                    other.gossip.take(data, router.address)
                    other.gossip.count()
        router.gossip.count()
    return sent


def acquainted(*routers):
    for _ in range(3):
        pass_on(*routers)
    return routers


def outstanding(router):
    return router.state.replicas[OUTSTANDING_REQUESTS].tolist()


def test_each_router_counts_the_requests_of_the_other():
    first, second = acquainted(*pair())
    jobs = [first.request(100) for _ in range(3)]
    pass_on(first, second)
    chosen = np.bincount([action for _, action in jobs], minlength=2).tolist()
    assert outstanding(second) == outstanding(first) == chosen
    prompts = second.state.replicas[OUTSTANDING_PROMPT_TOKENS].tolist()
    assert prompts == [100.0 * count for count in chosen]
    assert second.state.replicas[PENDING_PREFILL_TOKENS].tolist() == prompts
    assert [second.state.outstanding(slot) for slot in (0, 1)] == [0, 0]  # none is its own


def test_each_router_chooses_what_the_other_has_left_free():
    first, second = acquainted(*pair())
    _, chosen = first.request()
    pass_on(first, second)
    for _ in range(3):  # whatever ties are broken by
        job, other = second.request()
        assert other == 1 - chosen
        second.dispatcher.end(job, "cancelled")


def test_what_one_has_told_is_not_told_back_to_it():
    first, second = acquainted(*pair())
    first.request()
    second.request()
    for _ in range(5):
        pass_on(first, second)
    assert sum(outstanding(first)) == sum(outstanding(second)) == 2.0


def test_requests_that_end_are_gone_from_all_books():
    first, second = acquainted(*pair())
    job, _ = first.request()
    mine, _ = second.request()
    pass_on(first, second)
    first.dispatcher.first_token(job)
    first.dispatcher.finish(job, 1)
    pass_on(first, second)
    assert sum(outstanding(second)) == 1.0
    second.dispatcher.end(mine, "cancelled")
    pass_on(first, second)
    assert not first.state.replicas[OUTSTANDING_REQUESTS : PENDING_PREFILL_TOKENS + 1].any()
    assert outstanding(second) == [0.0, 0.0]


def test_the_last_own_request_takes_nothing_of_the_others_along():
    first, second = acquainted(*pair())
    first.request(100)
    mine, _ = second.request(50)
    pass_on(first, second)
    second.dispatcher.end(mine, "cancelled")
    assert sum(outstanding(second)) == 1.0
    assert second.state.replicas[OUTSTANDING_PROMPT_TOKENS].sum() == 100.0


def test_a_lost_datagram_is_made_good_by_the_next():
    first, second = acquainted(*pair())
    first.request()
    pass_on(first, second, lost=lambda data: True)
    assert outstanding(second) == [0.0, 0.0]
    pass_on(first, second)
    assert sum(outstanding(second)) == 1.0


def test_a_silent_router_is_forgotten():
    first, second = acquainted(*pair())
    first.request()
    pass_on(first, second)
    second.clock.now_s += 1.9
    second.gossip.count()
    assert sum(outstanding(second)) == 1.0
    second.clock.now_s += 0.2
    second.gossip.count()
    assert outstanding(second) == [0.0, 0.0]
    assert second.gossip.status() == [
        {
            "address": "127.0.0.1:1",
            "silent": True,
            "age_s": pytest.approx(2.1),
            "outstanding_requests": 0,
            "held_requests": 0,
            "arrival_rate_rps": 0.0,
        }
    ]


def test_a_router_that_starts_anew_has_nothing_of_what_it_had():
    first, second = acquainted(*pair())
    first.request()
    pass_on(first, second)
    anew = One(1, [2])
    acquainted(anew, second)
    assert outstanding(second) == [0.0, 0.0]
    anew.request()
    pass_on(anew, second)
    assert sum(outstanding(second)) == 1.0


def test_a_recording_counts_for_nothing():
    first, second = acquainted(*pair())
    first.request()
    sent = pass_on(first, second)
    (recorded,) = (data for data, sender, _ in sent if sender == first.address)
    pass_on(first, second)
    second.gossip.take(recorded, first.address)
    assert second.gossip.bad["replayed"] == 1


def test_a_recording_of_an_earlier_start_counts_for_nothing():
    first, second = acquainted(*pair())
    first.request()
    sent = pass_on(first, second)
    (recorded,) = (data for data, sender, _ in sent if sender == first.address)
    acquainted(One(1, [2]), second)
    second.gossip.take(recorded, first.address)
    second.gossip.count()
    assert outstanding(second) == [0.0, 0.0]
    assert second.gossip.bad["replayed"] == 1
    later = One(2, [1])  # nor to another start of the one it was for
    later.gossip.tell()
    later.gossip.take(recorded, first.address)
    later.gossip.count()
    assert outstanding(later) == [0.0, 0.0]


def test_what_was_held_back_on_its_way_counts_for_nothing():
    first, second = acquainted(*pair())
    first.request()
    sent = pass_on(first, second, lost=lambda data: True)
    (held_back,) = (data for data, sender, _ in sent if sender == first.address)
    second.clock.now_s += 2.5
    second.gossip.tell()
    second.gossip.take(held_back, first.address)
    second.gossip.count()
    assert outstanding(second) == [0.0, 0.0]
    assert second.gossip.status()[0]["silent"]


def test_who_is_not_named_is_not_heard():
    first, second = acquainted(*pair())
    first.request()
    ((data, _),) = first.gossip.tell()
    second.gossip.take(data, ("127.0.0.1", 9))
    second.gossip.count()
    assert second.gossip.bad["unknown"] == 1
    assert outstanding(second) == [0.0, 0.0]


def test_garbage_changes_nothing_and_is_counted():
    first, second = acquainted(*pair())
    first.request()
    pass_on(first, second)
    before = second.state.replicas.copy()
    rng = np.random.default_rng(0)
    for _ in range(500):
        second.gossip.take(rng.bytes(int(rng.integers(0, 1500))), first.address)
    ((data, _),) = first.gossip.tell()
    for length in range(len(data)):
        second.gossip.take(data[:length], first.address)
    second.gossip.count()
    assert sum(second.gossip.bad.values()) == 500 + len(data)
    assert np.array_equal(second.state.replicas, before)


def test_replicas_are_known_by_their_names():
    first, second = One(1, [2], ("a", "b")), One(2, [1], ("c", "b", "a"))
    acquainted(first, second)
    jobs = [first.request() for _ in range(2)]
    pass_on(first, second)
    assert sorted(action for _, action in jobs) == [0, 1]
    assert outstanding(second) == [0.0, 1.0, 1.0]


def test_a_fleet_that_changes_is_followed():
    first, second = acquainted(*pair())
    for _ in range(2):
        first.request()
    pass_on(first, second)
    second.dispatcher.remove(0)
    second.gossip.count()
    assert outstanding(second) == [0.0, 1.0]
    assert second.dispatcher.add("new", replica_facts(FACTS)) == 0
    slot = second.dispatcher.add("a", replica_facts(FACTS))
    second.gossip.count()
    assert outstanding(second) == [0.0, 1.0, 0.0]
    pass_on(first, second)
    assert slot == 2
    assert outstanding(second) == [0.0, 1.0, 1.0]


def test_a_decision_sees_what_comes_to_all_and_what_all_hold():
    first, second = acquainted(*pair())
    for _ in range(3):
        job = first.dispatcher.arrive(Size(10), key="k")
        first.clock.now_s += 0.5
    first.dispatcher.wait(job)
    pass_on(first, second)
    mine = second.dispatcher.arrive(Size(10), key="k")
    seen = second.state.observe(mine.request, second.clock())
    assert seen.request[0, ARRIVAL_RATE_RPS] == pytest.approx(2.0)
    assert seen.request[0, NUM_HELD] == 1.0


def test_512_replicas_and_four_routers():
    names = tuple(f"r{i}" for i in range(512))
    routers = [One(i, [j for j in range(1, 5) if j != i], names) for i in range(1, 5)]
    acquainted(*routers)
    for router in routers:
        for _ in range(64):
            router.request()
        pass_on(*routers)
    for router in routers:
        assert sum(outstanding(router)) == 256.0
        assert max(outstanding(router)) == 1.0  # each has gone where nobody was
    assert sum(routers[0].gossip.bad.values()) == 0


def test_the_page_says_who_is_heard():
    first, second = acquainted(*pair())
    first.request()
    pass_on(first, second)
    second.gossip.take(b"x", first.address)
    page = Exposition()
    second.gossip.write(page)
    lines = page.page().splitlines()
    for line in (
        'servegym_peer_silent{peer="127.0.0.1:1"} 0.0',
        'servegym_peer_age_seconds{peer="127.0.0.1:1"} 0.0',
        'servegym_peer_outstanding_requests{peer="127.0.0.1:1"} 1.0',
        'servegym_peer_bad_datagrams_total{reason="garbage"} 1.0',
    ):
        assert line in lines
