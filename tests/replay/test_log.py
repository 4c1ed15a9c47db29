"""Logs in, arrays out: rotated, torn, foreign, and with requests that went wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from servegym.errors import ConfigError, WorkloadError
from servegym.replay.fleet import router_fleet, scenario_fleet
from servegym.replay.log import read_log
from servegym.replay.rows import STATUSES
from servegym.serve.router.config import parse_config
from servegym.workloads.readers import read_trace

from .live import NAMES, play_live, scenario


def read(*paths, **settings):
    return read_log(paths, scenario_fleet(scenario()), **settings)


def row(**changes):
    base = {
        "key": "a",
        "arrival_s": 1.7e9,
        "prompt_tokens": 100,
        "output_tokens": 11,
        "predicted_output_tokens": 50.0,
        "cached_tokens": None,
        "slo_class": 0,
        "slo_class_name": "chat",
        "tenant": 1,
        "tenant_name": "t",
        "model": "m",
        "hash_ids": [],
        "status": "finished",
        "replica": 0,
        "replica_name": "one",
        "dispatch_s": 0.0,
        "ttft_s": 0.5,
        "e2e_s": 1.5,
        "num_retries": 0,
        "decisions": [{"after_s": 0.0, "action": 0, "by": "policy", "policy": "random"}],
    }
    return base | changes


def write(folder, *rows, name="requests-1.jsonl", end="\n"):
    text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + end
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_rotated_files_are_one_log_with_the_routers_names(exact):
    log = read(exact)
    assert len(log.files) == 3
    assert len(log) == log.counts()["finished"] == 400
    assert log.fleet.names == NAMES
    assert log.class_names == ("chat", "batch")
    assert log.deciders == {"least-outstanding": 400}
    assert (np.diff(log.table.arrival_s) >= 0).all()


def test_files_in_any_order_are_the_same_log(exact):
    files = sorted(exact.iterdir())
    np.testing.assert_array_equal(read(*files[::-1]).e2e_s, read(exact).e2e_s)


def test_a_file_given_twice_is_refused(exact):
    with pytest.raises(WorkloadError, match="given twice"):
        read(exact, next(iter(exact.iterdir())))


def test_parquet_says_the_same(tmp_path, exact):
    pytest.importorskip("pyarrow")
    play_live(tmp_path, scenario(), num_requests=400, format="parquet")
    one, other = read(tmp_path), read(exact)
    np.testing.assert_allclose(one.e2e_s, other.e2e_s)
    np.testing.assert_array_equal(one.replica, other.replica)


def test_the_log_is_a_trace_with_the_same_requests(exact):
    trace, log = read_trace(exact).table, read(exact).table
    np.testing.assert_allclose(trace.arrival_s, log.arrival_s)
    np.testing.assert_array_equal(trace.prompt_tokens, log.prompt_tokens)
    np.testing.assert_array_equal(trace.output_tokens, log.output_tokens)


def test_a_torn_last_line_is_named_and_can_be_skipped(tmp_path):
    path = write(tmp_path, row(), json.dumps(row())[:40], end="")
    with pytest.raises(WorkloadError, match=r"line 2.*torn.*--on-bad-row skip"):
        read(path)
    log = read(path, on_bad_row="skip")
    assert len(log) == 1
    assert log.num_skipped == 1
    assert "torn" in log.first_bad


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "lost"}, "'lost' must be one of finished"),
        ({"e2e_s": -1}, "e2e_s: -1 must be a finite number"),
        ({"e2e_s": 0.1}, "in this order"),
        ({"prompt_tokens": 0}, "whole number from 1"),
        ({"decisions": [{"action": "0"}]}, "each with action and after_s"),
        ({"hash_ids": ["x"]}, "hash_ids"),
        ({"follows": "a"}, "column follows: 'a' must be null, or have key"),
    ],
)
def test_an_impossible_row_is_named(tmp_path, changes, words):
    path = write(tmp_path, row(), row(**changes))
    with pytest.raises(WorkloadError, match=rf"requests-1.jsonl, line 2.*{words}"):
        read(path)
    assert read(path, on_bad_row="skip").num_skipped == 1


def test_a_row_of_another_version_is_named(tmp_path):
    old = {key: value for key, value in row().items() if key != "num_retries"}
    with pytest.raises(WorkloadError, match=r"no column num_retries: .*another version"):
        read(write(tmp_path, row(), old))


def test_a_trace_is_no_log(tmp_path):
    plain = {"arrival_s": 0.0, "prompt_tokens": 1, "output_tokens": 1}
    with pytest.raises(WorkloadError, match="no row of a decision log"):
        read(write(tmp_path, plain))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(WorkloadError, match="no file of a decision log"):
        read(tmp_path)


def test_a_log_of_a_larger_fleet_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="replica 7, the fleet given only 3"):
        read(write(tmp_path, row(replica=7)))


def test_a_class_that_the_fleet_lacks_is_refused(tmp_path):
    with pytest.raises(WorkloadError, match="SLO class 4"):
        read(write(tmp_path, row(slo_class=4, slo_class_name="gold")))


def test_every_way_to_end_is_counted(tmp_path):
    again = [{"after_s": 0.0, "action": 1}, {"after_s": 0.2, "action": 0}]
    held = [{"after_s": 0.0, "action": -1}, {"after_s": 0.1, "action": 0}]
    rejected = [{"after_s": 0.0, "action": -2}]
    gone = {"replica": -1, "replica_name": None, "ttft_s": None}
    log = read(
        write(
            tmp_path,
            row(),
            row(decisions=again, num_retries=1),
            row(decisions=held),
            row(status="rejected", decisions=rejected, **gone),
            row(status="cancelled", output_tokens=50, e2e_s=1.0),
            row(status="failed", decisions=again[:1], **gone),
            row(ttft_s=1.5),
            row(key="f", arrival_s=1.7e9 + 5, follows={"key": "a", "delay_s": 3.5, "by": "prefix"}),
            row(arrival_s=1.7e9 + 6, follows={"key": "z", "delay_s": 1.0, "by": "session"}),
        )
    )
    assert log.counts() == {
        "requests": 9,
        "finished": 6,
        "rejected": 1,
        "cancelled": 1,
        "failed": 1,
        "retried": 1,
        "held": 1,
        "not_streamed": 1,
        "following_by_session": 0,
        "following_by_prefix": 1,
        "without_predecessor": 1,
        "bad_rows": 0,
    }
    assert log.dispatch_s[1] == 0.2
    by_status = {STATUSES[s]: i for i, s in enumerate(log.status.tolist())}
    assert not log.dispatched[by_status["rejected"]]
    assert log.replica[by_status["failed"]] == 1  # where it had been sent
    # half a second at the pace of the others, 0.1 s a token, after the first
    assert log.table.output_tokens[by_status["cancelled"]] == 6


def test_a_configuration_that_lists_no_replicas_is_no_fleet():
    config = parse_config({"replicas_file": "fleet.yaml"}, "test")
    with pytest.raises(ConfigError, match="finds its replicas while it runs: give one that lists"):
        router_fleet(config)
