"""Conversations: turns repeat what was said, system prompts are shared, the load is steady."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.errors import WorkloadError
from servegym.workloads.config import GeneratedConfig, SessionConfig
from servegym.workloads.mixtures import LengthConfig
from servegym.workloads.table import BY_ITSELF

SYSTEM_TOKENS = 100
SESSIONS = SessionConfig(
    mean_turns=4.0,
    think_s=5.0,
    num_system_prompts=4,
    system_prompt_tokens=SYSTEM_TOKENS,
    zipf=1.0,
    max_context_tokens=100_000,
)


def draw(sessions=SESSIONS, num=20_000, seed=0, rate=50.0, num_tenants=1, **options):
    config = GeneratedConfig(
        rate_rps=rate,
        prompt=LengthConfig(medians_tokens=(50.0,), sigmas=(0.5,)),
        output=LengthConfig(medians_tokens=(80.0,), sigmas=(0.5,)),
        sessions=sessions,
        num_tenants=num_tenants,
    )
    return config.table(np.random.default_rng(seed), num_requests=num, **options)


@pytest.fixture(scope="module")
def table():
    return draw()


def successive_turns(table):
    """Pairs `(earlier, later)` of successive turns of one conversation."""
    order = np.lexsort((table.arrival_s, table.session))
    follows = np.diff(table.session[order]) == 0
    return order[:-1][follows], order[1:][follows]


def system_key(table):
    return table.prefix_keys[0::2]  # two segments a request: system prompt, conversation


def test_a_turn_repeats_the_earlier_turn_and_its_answer(table):
    before, after = successive_turns(table)
    said_by_then = table.prompt_tokens[before] + table.output_tokens[before]
    assert (table.prompt_tokens[after] > said_by_then).all()


def test_turns_of_a_conversation_share_their_whole_context(table):
    before, after = successive_turns(table)
    keys, ends = table.prefix_keys.reshape(-1, 2), table.prefix_ends.reshape(-1, 2)
    assert (keys[before] == keys[after]).all()
    said_by_then = table.prompt_tokens[before] + table.output_tokens[before]
    assert (ends[before, 1] >= said_by_then).all()
    assert (ends[after, 1] >= said_by_then).all()


def test_a_conversation_keeps_its_tenant_and_class():
    table = draw(num_tenants=5, class_shares=(0.7, 0.3))
    before, after = successive_turns(table)
    assert (table.tenant[before] == table.tenant[after]).all()
    assert (table.slo_class[before] == table.slo_class[after]).all()
    # some 5000 conversations: standard errors of 0.6 % and 0.7 %, a little more by their lengths
    assert np.bincount(table.tenant) / len(table) == pytest.approx([0.2] * 5, abs=0.03)
    assert table.slo_class.mean() == pytest.approx(0.3, abs=0.03)


def test_different_conversations_share_the_system_prompt_alone(table):
    keys, ends = table.prefix_keys.reshape(-1, 2), table.prefix_ends.reshape(-1, 2)
    assert (ends[:, 0] == SYSTEM_TOKENS).all()
    owners: dict[int, set[int]] = {}
    for key, session in zip(keys[:, 1].tolist(), table.session.tolist(), strict=True):
        owners.setdefault(key, set()).add(session)
    assert {len(sessions) for sessions in owners.values()} == {1}
    assert not set(keys[:, 0].tolist()) & set(owners)


def test_the_first_prompt_starts_with_the_system_prompt(table):
    assert (table.prompt_tokens > SYSTEM_TOKENS).all()


@pytest.mark.parametrize(
    ("zipf", "shares"),
    [
        (1.0, [12 / 25, 6 / 25, 4 / 25, 3 / 25]),  # 1, 1/2, 1/3, 1/4 over their sum 25/12
        (0.0, [1 / 4] * 4),
    ],
)
def test_system_prompts_are_zipf_popular(zipf, shares):
    table = draw(SESSIONS.model_copy(update={"zipf": zipf}))
    _, first = np.unique(table.session, return_index=True)
    counts = np.bincount(system_key(table)[first])[1:]
    # some 5000 conversations: a standard error of 0.7 %
    assert counts / counts.sum() == pytest.approx(shares, abs=0.025)


def test_conversations_have_the_mean_length_asked_for(table):
    # 20,000 requests of 4 turns a conversation; some 3 % more are cut at either end
    assert len(np.unique(table.session)) == pytest.approx(5000, rel=0.08)


def test_turns_are_think_time_apart(table):
    before, after = successive_turns(table)
    gaps = table.arrival_s[after] - table.arrival_s[before]
    assert gaps.mean() == pytest.approx(5.0, rel=0.05)
    assert np.median(gaps) == pytest.approx(5.0 * np.log(2), rel=0.05)  # exponential


def test_a_long_stream_has_the_rate_asked_for(table):
    assert table.rate_rps == pytest.approx(50.0, rel=0.05)


def test_a_stream_is_in_its_steady_state_from_the_first_request_on():
    # think time 20 s: all 250 requests come within the first quarter of a think time
    slow = SESSIONS.model_copy(update={"think_s": 20.0})
    rates = [250 / draw(slow, num=250, seed=seed).arrival_s[-1] for seed in range(60)]
    assert np.mean(rates) == pytest.approx(50.0, rel=0.05)


def test_no_turn_exceeds_the_context():
    table = draw(SESSIONS.model_copy(update={"max_context_tokens": 700}), num=2000)
    assert (table.prompt_tokens + table.output_tokens).max() <= 700


def test_a_context_that_next_to_no_turn_fits_is_refused():
    tight = SESSIONS.model_copy(update={"max_context_tokens": SYSTEM_TOKENS + 10})
    with pytest.raises(WorkloadError, match=r"fits max_context_tokens \(110\)"):
        draw(tight, num=100)


def test_a_context_limit_ends_conversations_and_does_not_cut_turns():
    limit = 700
    whole = draw(num=2000)
    short = draw(SESSIONS.model_copy(update={"max_context_tokens": limit}), num=2000)
    longest = np.bincount(np.unique(short.session, return_inverse=True)[1]).max()
    assert longest < np.bincount(np.unique(whole.session, return_inverse=True)[1]).max()
    before, after = successive_turns(short)
    said_by_then = short.prompt_tokens[before] + short.output_tokens[before]
    assert (short.prompt_tokens[after] > said_by_then).all()


def test_seeds_give_different_conversations_with_different_texts():
    one, other = draw(num=200, seed=1), draw(num=200, seed=2)
    assert not set(one.prefix_keys[1::2].tolist()) & set(other.prefix_keys[1::2].tolist())


def test_users_who_wait_for_answers_say_the_same_but_go_by_their_answers():
    apart = SESSIONS.model_copy(update={"wait_for_answers": False})
    open_loop, closed = draw(apart, num=2000), draw(num=2000)
    assert (open_loop.after == BY_ITSELF).all()
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "session", "prefix_keys"):
        np.testing.assert_array_equal(getattr(open_loop, name), getattr(closed, name))
    for i, before in enumerate(closed.after.tolist()):
        earlier = np.flatnonzero(closed.session[:i] == closed.session[i])
        assert before == (earlier[-1] if len(earlier) else BY_ITSELF)
    waits = closed.after >= 0
    assert waits.sum() > 500
    # between two turns of the open loop lies what the user of the closed one thinks
    gaps = closed.arrival_s[waits] - closed.arrival_s[closed.after[waits]]
    np.testing.assert_allclose(closed.delay_s[waits], gaps, rtol=1e-9, atol=1e-9)
    assert (closed.delay_s[~waits] == 0).all()
