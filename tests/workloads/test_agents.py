"""Sessions of agents: contexts that grow, tools between calls, and the data they are fitted to."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.state import NEVER, Asks
from servegym.errors import ConfigError
from servegym.scenario import load_scenario, parse_scenario
from servegym.workloads.agents import AgentsConfig, UsersConfig
from servegym.workloads.mixtures import LengthConfig, Seconds
from servegym.workloads.recorded import read_sessions
from servegym.workloads.sessions import recorded_sessions

WEKA = (
    Path(__file__).resolve().parents[2].parent
    / "shared/data/traces/weka_agentic_sessions_firsthalf.parquet"
)


def fixed(tokens):
    return LengthConfig(medians_tokens=(tokens,), sigmas=(0.0,), max_tokens=10**6)


def seconds(duration_s):
    return Seconds(medians_s=(duration_s,), sigmas=(0.0,))


def plain(**changes):
    """Five calls a session, of 1000, 1150, 1300, 1450 and 1600 tokens, 7 s apart."""
    return AgentsConfig(
        **{
            "rate_rps": 2.0,
            "calls": fixed(5),
            "first_prompt": fixed(1000),
            "output": fixed(50),
            "added": fixed(100),
            "tool": seconds(7.0),
            "pause_probability": 0.0,
            "rewrite_probability": 0.0,
            "system_prompt_tokens": 320,
            **changes,
        }
    )


def of_users(*, users=(), **changes):
    """The same sessions, three a user of which two run at once; 50 s pass before the third."""
    three = {"sessions": fixed(3), "at_once": 2, "pause": seconds(50.0), "context_tokens": 128}
    return plain(users=UsersConfig(**{**three, **dict(users)}), **changes)


def play(config, num_requests=80):
    """Play a draw on one replica; returns the table and what became of it."""
    scenario = load_scenario("agent-sessions")
    fleet = scenario.fleet[0].model_copy(update={"count": 1})
    scenario = scenario.model_copy(
        update={"workload": config, "fleet": (fleet,), "num_requests": num_requests}
    )
    episode = scenario.episode(0)
    sim = Simulator(scenario.spec, [episode], asks=Asks(dispatch=NEVER))
    sim.advance()
    return episode.table, sim.outcomes()


def test_a_prompt_is_the_one_before_its_answer_and_what_was_added():
    pool = plain().pool(np.random.default_rng(0), 3)
    assert pool.prompt_tokens.tolist() == [1000, 1150, 1300, 1450, 1600] * 3
    assert pool.output_tokens.tolist() == [50] * 15
    assert pool.shared_tokens.tolist() == [0, 1050, 1200, 1350, 1500] * 3
    assert pool.after.tolist() == [-1, 0, 1, 2, 3, -1, 5, 6, 7, 8, -1, 10, 11, 12, 13]
    assert pool.delay_s.tolist() == [0.0, 7.0, 7.0, 7.0, 7.0] * 3


def test_a_context_that_would_be_too_long_is_rewritten():
    config = plain(calls=fixed(200), max_context_tokens=2000)
    pool = config.pool(np.random.default_rng(0), 20)
    total = pool.prompt_tokens + pool.output_tokens
    assert total.max() <= 2000
    chain = pool.prompt_tokens.reshape(20, 200)
    shrinks = np.diff(chain, axis=1) < 0
    # from 1000 on by 150 a call: over at the eighth (2050 + 50), and never before
    assert (np.argmax(shrinks, axis=1) == 6).all()
    after = chain[:, 1:][shrinks]
    assert (after >= 321).all()
    # 0.15 to 0.9 of the limit, and room for an answer
    assert after.max() <= 0.9 * 2000
    shared = pool.shared_tokens.reshape(20, 200)[:, 1:][shrinks]
    assert (shared >= 320).all()
    assert (shared <= after).all()


def test_a_first_prompt_that_would_be_too_long_is_rewritten_too():
    pool = plain(first_prompt=fixed(5000), max_context_tokens=2000).pool(
        np.random.default_rng(0), 50
    )
    assert pool.prompt_tokens[::5].max() <= 1800
    assert pool.prompt_tokens[::5].min() >= 321


def test_turns_end_with_pauses_as_often_as_asked_for():
    config = plain(calls=fixed(100), pause_probability=0.25, pause=seconds(500.0), max_pause_s=60.0)
    delay_s = config.pool(np.random.default_rng(0), 100).delay_s
    assert set(delay_s.tolist()) == {0.0, 7.0, 60.0}
    # 9,900 draws: a standard error of 0.4 %
    assert (delay_s == 60.0).sum() / 9900 == pytest.approx(0.25, abs=0.02)


def test_engines_find_all_that_was_said_before():
    table, run = play(plain())
    waits = np.flatnonzero(table.after >= 0)
    before = table.after[waits]
    np.testing.assert_array_equal(run["arrival_s"][waits], run["finish_s"][before] + 7.0)
    # of blocks of 64: the prompt before and its answer, whose last token has no KV yet
    assert (
        run["cached_tokens"][waits].tolist()
        == ((table.prompt_tokens[before] + 49) // 64 * 64).tolist()
    )
    # first calls find the system prompt, once any call has brought it
    alone = np.flatnonzero(table.after < 0)
    assert set(run["cached_tokens"][alone].tolist()) <= {0, 320}
    assert (run["cached_tokens"][alone] == 320).mean() > 0.5


def test_a_session_keeps_its_tenant_and_class_and_load_its_rate():
    config = plain(num_tenants=5)
    table = config.table(
        np.random.default_rng(0), num_requests=3000, load=3.0, class_shares=(0.5, 0.5)
    )
    waits = table.after >= 0
    for column in (table.tenant, table.slo_class):
        assert (column[waits] == column[table.after[waits]]).all()
        assert len(set(column.tolist())) > 1
    # 600 sessions: a standard error of 4 %
    assert 3000 / table.arrival_s[-1] == pytest.approx(6.0, rel=0.12)


@pytest.mark.skipif(not WEKA.is_file(), reason="the trace extracts are not here")
def test_drawn_sessions_are_as_close_to_recorded_ones_as_documented():
    pytest.importorskip("pyarrow")
    recorded, _ = recorded_sessions(read_sessions(WEKA))
    config = AgentsConfig(rate_rps=1.0, max_context_tokens=1_000_000, max_pause_s=86400.0)
    drawn = config.pool(np.random.default_rng(0), 2000)

    def added(pool):
        before = np.maximum(pool.continues, 0)
        more = pool.prompt_tokens - pool.prompt_tokens[before] - pool.output_tokens[before]
        goes_on = (pool.continues >= 0) & (pool.shared_tokens > pool.prompt_tokens[before] - 64)
        return more[goes_on]

    a, b = added(recorded), added(drawn)
    # answers that do not come back whole, as without their reasoning, are not drawn
    assert (a <= 0).mean() == pytest.approx(0.072, abs=0.001)
    a, b = np.sort(a[a > 0]), np.sort(b[b > 0])
    at = np.concatenate((a, b))
    shares = [np.searchsorted(x, at, side="right") / len(x) for x in (a, b)]
    assert np.abs(shares[0] - shares[1]).max() < 0.02
    assert b.mean() == pytest.approx(a.mean(), rel=0.05)


def test_a_system_prompt_beyond_the_context_is_refused():
    text = """
name: tiny
fleet: [{gpu: L40S}]
workload: {kind: agents, rate_rps: 1.0, max_context_tokens: 321, system_prompt_tokens: 320}
"""
    with pytest.raises(ConfigError, match=r"max_context_tokens \(321\) must exceed system_prompt"):
        parse_scenario(text, "tiny.yaml")


def test_a_user_begins_some_sessions_at_once_and_others_after_these():
    pool = of_users().pool(np.random.default_rng(0), 2)
    assert pool.session.tolist() == [s for s in range(6) for _ in range(5)]
    assert pool.user.tolist() == [0] * 15 + [1] * 15
    # sessions of rows 0-4, 5-9 and 10-14: the third begins 50 s after the last call of the first
    assert pool.after[[0, 5, 10, 15, 20, 25]].tolist() == [-1, -1, 4, -1, -1, 19]
    assert pool.delay_s[[0, 5, 10, 15, 20, 25]].tolist() == [0, 0, 50, 0, 0, 50]
    assert pool.begin_s[[0, 5, 9, 10, 14]].tolist() == [0, 0, 28, 78, 106]
    assert pool.length_s.tolist() == [106, 106]
    # a new session goes on from no text
    assert pool.continues[10] == -1
    assert pool.after[11:15].tolist() == pool.continues[11:15].tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("users", "begin_s"),
    [
        ({"at_once": 1}, [0, 78, 156]),  # one after the other
        ({"at_once": 3}, [0, 0, 0]),  # together
        ({"at_once": 9, "start_gap": seconds(10.0)}, [0, 10, 20]),
        ({"at_once": 2, "start_gap": seconds(10.0)}, [0, 10, 78]),
    ],
)
def test_how_sessions_of_a_user_overlap(users, begin_s):
    pool = of_users(users=users).pool(np.random.default_rng(0), 3)
    np.testing.assert_allclose(pool.begin_s[::5], begin_s * 3)


def test_pauses_between_sessions_are_cut_as_others_are():
    pool = of_users(max_pause_s=20.0).pool(np.random.default_rng(0), 1)
    assert pool.delay_s[10] == 20.0


def test_users_get_sessions_of_all_lengths_and_as_many_as_drawn():
    counts = LengthConfig(medians_tokens=(4.0,), sigmas=(0.7,), max_tokens=40)
    lengths = LengthConfig(medians_tokens=(6.0,), sigmas=(0.8,), max_tokens=60)
    config = of_users(users={"sessions": counts}, calls=lengths)
    pool = config.pool(np.random.default_rng(3), 2000)
    calls = np.bincount(pool.session)
    per_user = np.bincount(pool.user[np.unique(pool.session, return_index=True)[1]])
    # 2,000 users and 10,000 sessions: standard errors of 2 % and 1 %
    for found, asked, tolerance in ((per_user, counts, 0.06), (calls, lengths, 0.04)):
        drawn = asked.draw(np.random.default_rng(9), 100_000)
        assert found.mean() == pytest.approx(drawn.mean(), rel=tolerance)
    # the first sessions of users are no longer than the last ones
    first = np.searchsorted(pool.user, np.arange(2000))
    last = np.searchsorted(pool.user, np.arange(2000), side="right") - 1
    longer = calls[pool.session[first]].mean() / calls[pool.session[last]].mean()
    assert longer == pytest.approx(1.0, abs=0.1)


def test_the_tenant_is_the_user_and_no_more_sessions_of_one_are_under_way_than_at_once():
    config = of_users(users={"sessions": fixed(7), "at_once": 3})
    table = config.table(np.random.default_rng(1), num_requests=4000, class_shares=(0.5, 0.5))
    assert set(table.tenant.tolist()) == set(range(table.tenant.max() + 1))
    together, busiest = [], 0
    for tenant in range(table.tenant.max() + 1):
        mine = table.tenant == tenant
        names = np.unique(table.session[mine])
        # 35 calls of 7 sessions, unless they are cut by the ends of the stream
        assert mine.sum() <= 35
        assert len(names) <= 7
        spans = [table.arrival_s[table.session == name] for name in names]
        begin, end = (np.array([f(s) for s in spans]) for f in (np.min, np.max))
        under_way = [((begin <= at) & (at <= end)).sum() for at in begin]
        busiest = max(busiest, *under_way)
        together.append(mine.sum())
    assert busiest == 3
    assert max(together) == 35
    # a session has one tenant and one class
    for name in np.unique(table.session):
        assert len(set(table.tenant[table.session == name].tolist())) == 1
        assert len(set(table.slo_class[table.session == name].tolist())) == 1


def test_users_share_a_text_that_nobody_else_has():
    table = of_users().table(np.random.default_rng(0), num_requests=600)
    counts = np.diff(table.prefix_offsets)
    assert (counts == 3).all()  # what all share, what the user's sessions share, the session's own
    keys, ends = table.prefix_keys.reshape(-1, 3), table.prefix_ends.reshape(-1, 3)
    assert (ends[:, :2] == [320, 448]).all()
    assert len(np.unique(keys[:, 0])) == 1
    for column, owner in ((1, table.tenant), (2, table.session)):
        pairs = np.unique(np.stack((keys[:, column], owner), axis=1), axis=0)
        assert len(pairs) == len(np.unique(keys[:, column])) == len(np.unique(owner))
    assert len(np.unique(keys)) == 1 + len(np.unique(table.tenant)) + len(np.unique(table.session))


def test_a_rewritten_context_begins_as_all_of_the_users_do():
    pool = of_users(calls=fixed(60), max_context_tokens=2000).pool(np.random.default_rng(0), 5)
    goes_on = pool.continues >= 0
    assert pool.shared_tokens[goes_on].min() >= 448
    assert pool.prompt_tokens.min() >= 449


def test_engines_find_a_users_text_in_a_later_session():
    # one after the other, on one replica: nothing is evicted
    config = of_users(users={"at_once": 1}, rate_rps=0.5)
    table, run = play(config, 200)
    begins = np.flatnonzero(np.isin(np.arange(200), np.unique(table.session, return_index=True)[1]))
    later = [i for i in begins if (table.tenant[:i] == table.tenant[i]).any()]
    assert len(later) > 10
    # of blocks of 64, system prompt and context are 5 and 2
    assert set(run["cached_tokens"][later].tolist()) == {448}
    others = np.setdiff1d(begins, later)
    assert set(run["cached_tokens"][others].tolist()) <= {0, 320}


def test_the_laws_of_closed_loops_hold_for_users_agents():
    config = of_users(users={"sessions": fixed(6), "at_once": 3}, calls=fixed(4))
    table, run = play(config, 400)
    arrival_s, finish_s = run["arrival_s"], run["finish_s"]
    waits = np.flatnonzero(table.after >= 0)
    before = table.after[waits]
    np.testing.assert_array_equal(arrival_s[waits], finish_s[before] + table.delay_s[waits])
    assert set(table.delay_s[waits].tolist()) == {7.0, 50.0}
    # nobody has more requests in the system than agents
    for tenant in np.unique(table.tenant):
        mine = table.tenant == tenant
        inside = [
            (mine & (arrival_s <= at) & (finish_s > at)).sum() for at in arrival_s[mine].tolist()
        ]
        assert max(inside) <= 3
    # Little: the integral of those in the system is the sum of their times in it
    n = len(table)
    times = np.concatenate((arrival_s, finish_s))
    steps = np.concatenate((np.ones(n), -np.ones(n)))
    order = np.lexsort((steps, times))
    integral = math.fsum(np.cumsum(steps[order])[:-1] * np.diff(times[order]))
    response_s = math.fsum(finish_s - arrival_s)
    assert integral == pytest.approx(response_s, rel=1e-9)
    # an agent is waiting for an answer or its delay passes, from its first arrival to its last end
    alone = np.flatnonzero(table.after < 0)
    ends = np.setdiff1d(np.arange(n), before)
    assert len(ends) == len(alone)
    agents_s = math.fsum(finish_s[ends]) - math.fsum(arrival_s[alone])
    assert agents_s == pytest.approx(response_s + math.fsum(table.delay_s[waits]), rel=1e-9)


def test_seeds_draw_other_users_and_load_makes_more_of_them_come():
    config = of_users()
    a, b, c = (config.table(np.random.default_rng(s), num_requests=500) for s in (1, 1, 2))
    for name in ("arrival_s", "tenant", "session", "prefix_keys"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert not np.array_equal(a.arrival_s, c.arrival_s)
    assert not np.isin(a.prefix_keys[1::3], c.prefix_keys[1::3]).any()
    tables = [
        config.table(np.random.default_rng(s), num_requests=900, load=load)
        for s in range(20)
        for load in (1.0, 3.0)
    ]
    rates = [900 / t.arrival_s[-1] for t in tables]
    # 2 calls a second, 15 a user: 1,200 users at each load
    assert np.mean(rates[::2]) == pytest.approx(2.0, rel=0.08)
    assert np.mean(rates[1::2]) == pytest.approx(6.0, rel=0.08)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("num_tenants: 2, users: {}", "num_tenants is 2, but with users each of them is a tenant"),
        (
            "max_context_tokens: 500, system_prompt_tokens: 320, users: {context_tokens: 180}",
            r"system_prompt_tokens and context_tokens of users \(320 \+ 180\) by 2",
        ),
        ("users: {at_once: 0}", "at_once"),
    ],
)
def test_users_that_cannot_be_are_refused(more, message):
    text = f"""
name: tiny
fleet: [{{gpu: L40S}}]
workload: {{kind: agents, rate_rps: 1.0, {more}}}
"""
    with pytest.raises(ConfigError, match=message):
        parse_scenario(text, "tiny.yaml")
