"""Sessions of agents: contexts that grow, tools between calls, and the data they are fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.state import NEVER, Asks
from servegym.errors import ConfigError
from servegym.scenario import load_scenario, parse_scenario
from servegym.workloads.agents import AgentsConfig
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
    scenario = load_scenario("agent-sessions")
    scenario = scenario.model_copy(
        update={"workload": plain(), "fleet": scenario.fleet[:1], "num_requests": 80}
    )
    fleet = scenario.fleet[0].model_copy(update={"count": 1})
    scenario = scenario.model_copy(update={"fleet": (fleet,)})
    episode = scenario.episode(0)
    sim = Simulator(scenario.spec, [episode], asks=Asks(dispatch=NEVER))
    sim.advance()
    run, table = sim.outcomes(), episode.table
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
