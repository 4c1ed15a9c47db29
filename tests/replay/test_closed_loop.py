"""Logs that say what followed what, under policies: users wait for their answers, or do not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from servegym.cli import main
from servegym.commands.train import Train
from servegym.errors import ConfigError
from servegym.replay.counterfactual import Arrivals, counterfactuals
from servegym.replay.fleet import scenario_fleet
from servegym.replay.forced import Factors, Forced
from servegym.replay.log import read_log
from servegym.scenario import load_scenario
from servegym.workloads.readers import read_trace

from .live import SESSIONS, play_live, scenario
from .test_log import row, write

#: Arrivals are read from a wall clock of 1.7e9 s, whose float64 has steps of 2.4e-7 s.
EXACT_S = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sessions")
    play_live(folder, scenario(SESSIONS), num_requests=300, policy="round-robin")
    return folder


@pytest.fixture(scope="module")
def log(folder):
    return read_log([folder], scenario_fleet(scenario(SESSIONS)))


def times(factor: float) -> Factors:
    return Factors(np.zeros(0), np.full((1, 3, 3), factor))


def test_the_log_says_what_the_users_did(log):
    played = scenario(SESSIONS).episode(5, num_requests=300).table
    # the first turn of each that the window has comes by itself
    assert log.links.num_by == {"session": played.num_waiting, "prefix": 0}
    assert played.num_waiting > 150
    waits = log.table.after >= 0
    np.testing.assert_allclose(
        np.sort(log.table.delay_s[waits]),
        np.sort(played.delay_s[played.after >= 0]),
        atol=EXACT_S,
    )


def test_the_same_policy_meets_the_recorded_arrivals(log):
    played = list(counterfactuals(log, ["round-robin"], times(1.0)))
    assert played
    for one in played:
        np.testing.assert_allclose(one.shift_s, 0.0, atol=EXACT_S)
        assert one.agreement == 1.0
        rows = log.e2e_s[log.finished]
        assert one.statistics["e2e_s", "mean"] == pytest.approx(rows.mean(), rel=1e-6)


def test_slower_engines_slow_users_down_in_a_closed_loop_alone(log):
    waits = log.table.after >= 0
    [closed] = counterfactuals(log, [], times(2.0))
    [opened] = counterfactuals(log, [], times(2.0), Arrivals.of(log, "open"))
    np.testing.assert_allclose(closed.shift_s[~waits], 0.0, atol=EXACT_S)
    # every answer takes longer, and on average more than twice as long: users also crowd more
    before = log.table.after[waits]
    longer_s = closed.shift_s[waits] - closed.shift_s[before]
    assert (longer_s > 0.0).all()
    assert longer_s.sum() > log.e2e_s[before].sum()
    np.testing.assert_array_equal(opened.shift_s, 0.0)
    # ... and so the fleet is less crowded than it would be with users who do not wait
    assert closed.statistics["e2e_s", "mean"] < opened.statistics["e2e_s", "mean"]


def test_costs_change_when_they_changed(log):
    factors = Factors(np.array([8.0]), np.stack((np.ones((3, 3)), np.full((3, 3), 3.0))))
    _, one = counterfactuals(log, ["round-robin"], factors)
    early = log.table.arrival_s < 8.0
    np.testing.assert_allclose(one.shift_s[early], 0.0, atol=EXACT_S)
    assert one.shift_s[~early].max() > 1.0


def test_the_way_of_answers_passes_before_the_next_request(tmp_path):
    play_live(tmp_path, scenario(SESSIONS), num_requests=200, policy="round-robin", request_s=0.05)
    found = read_log([tmp_path], scenario_fleet(scenario(SESSIONS)))
    arrivals = Arrivals.of(found)
    [early] = counterfactuals(found, [], times(1.0), arrivals)
    waits = arrivals.table.after >= 0
    assert early.shift_s[waits].mean() < -0.05  # once for each turn, on average
    [right] = counterfactuals(found, [], times(1.0), arrivals.with_way(np.full(200, 0.05)))
    np.testing.assert_allclose(right.shift_s, 0.0, atol=EXACT_S)
    # an answer cannot come before its end
    none = arrivals.with_way(np.full(200, -1e9))
    np.testing.assert_array_equal(none.table.delay_s[waits], 0.0)


def test_dispatches_are_forced_when_they_were(log):
    forced = Forced.of(log)
    assert forced.table.num_waiting == 0
    [made] = forced.play([times(1.0)])
    np.testing.assert_allclose(made.e2e_s, log.e2e_s[forced.rows], atol=EXACT_S)


def test_the_log_is_a_closed_loop_for_evaluate(folder, log, tmp_path, capsys):
    table = read_trace(folder).table
    np.testing.assert_array_equal(table.after, log.table.after)
    fleet = tmp_path / "live.yaml"
    fleet.write_text(SESSIONS)
    words = ["evaluate", "--scenario", str(fleet), "--trace", str(folder)]
    words += ["--policies", "round-robin", "--seeds", "2", "--loads", "1.0"]
    main([*words, "--num-requests", "100"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{log.links.num_waiting} of 300 requests wait for an answer" in said
    main([*words, "--num-requests", "100", "--no-wait-for-answers"])
    assert "wait for" not in capsys.readouterr().out


def test_the_log_is_a_closed_loop_for_train(folder, tmp_path):
    fleet = tmp_path / "live.yaml"
    fleet.write_text(SESSIONS)
    path = Train(scenario=str(fleet), trace=str(folder)).chosen_file(tmp_path / "run")
    table = load_scenario(path).episode(0, num_requests=100).table
    assert table.num_waiting > 50
    text = (tmp_path / "run" / "scenario.yaml").read_text()
    opened = tmp_path / "open.yaml"
    opened.write_text(text.replace("wait_for_answers: true", "wait_for_answers: false"))
    assert load_scenario(str(opened)).episode(0, num_requests=100).table.num_waiting == 0


def follow(key, at_s, of, delay_s, **changes):
    follows = {"key": of, "delay_s": delay_s, "by": "session"}
    return row(key=key, arrival_s=1.7e9 + at_s, follows=follows, **changes)


def read(path):
    return read_log([path], scenario_fleet(scenario(SESSIONS)))


def test_what_follows_a_request_that_is_not_played_comes_when_it_came(tmp_path):
    huge = 10**8  # for no replica
    found = read(
        write(
            tmp_path,
            row(key="a"),
            row(key="b", prompt_tokens=huge),
            follow("c", 2.0, "a", 0.5),
            follow("d", 3.0, "b", 1.5),
            follow("e", 4.0, "lost", 1.5),
        )
    )
    assert (found.links.num_waiting, found.links.num_cut) == (2, 1)
    arrivals = Arrivals.of(found)
    assert arrivals.loop == "closed"
    assert arrivals.table.after.tolist() == [-1, 0, -1, -1]
    assert arrivals.table.arrival_s.tolist() == [0.0, 2.0, 3.0, 4.0]
    assert arrivals.table.num_waiting == 1


def test_a_log_that_does_not_say_is_an_open_loop(tmp_path):
    found = read(write(tmp_path, row(key="a"), row(key="b")))
    assert Arrivals.of(found).loop == "open"
    with pytest.raises(ConfigError, match=r"does not say what followed what.*leave --loop out"):
        Arrivals.of(found, "closed")


@pytest.mark.parametrize("loop", ["closed", "open"])
def test_the_command_says_which_loop_it_is(folder, log, tmp_path, capsys, loop):
    fleet, numbers = tmp_path / "live.yaml", tmp_path / "r.json"
    fleet.write_text(SESSIONS)
    words = ["--scenario", str(fleet), "--policies", "round-robin", "--json", str(numbers)]
    main(["replay", str(folder), *words, *(["--loop", "open"] if loop == "open" else [])])
    said = " ".join(capsys.readouterr().out.split())
    waiting = log.links.num_waiting if loop == "closed" else 0
    assert f"{loop.capitalize()} loop: " in said
    found = json.loads(numbers.read_text())
    assert found["arrivals"] == {
        "loop": loop,
        "requests": 300,
        "waiting": waiting,
        "without_predecessor": 0,
    }
    assert found["counts"]["following_by_session"] == log.links.num_waiting
    for one in found["counterfactuals"]:
        assert one["arrival_shift_s"].keys() == {"mean", "least", "most"}
