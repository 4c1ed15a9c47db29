"""The decision log: read as a trace and as an event log, rotated, bounded, never in the way."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from servegym.cluster.outcome import latencies, outcomes_from_events
from servegym.errors import ConfigError, WorkloadError
from servegym.replay.dataset import read_dataset
from servegym.serve.decision_log import (
    LOGGED_HOLD,
    LOGGED_REJECT,
    DecisionLog,
    DecisionLogConfig,
    logged_action,
    mask_action,
    read_events,
    read_rows,
)
from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Rates, fleet_facts
from servegym.serve.runtime import RuntimeConfig
from servegym.workloads.readers import read_trace


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(folder, **settings) -> tuple[Dispatcher, Clock]:
    clock = Clock()
    config = DispatchConfig(
        runtime=RuntimeConfig(policy="round-robin"),
        slo_classes=({"name": "chat"}, {"name": "batch"}),
        allow_hold=True,
        log=DecisionLogConfig(folder=folder, **settings),
    )
    rates = Rates(prefill_tokens_per_s=1000.0, decode_step_s=0.01)
    return Dispatcher(config, ["a", "b"], fleet_facts([rates, rates]), clock), clock


def play(dispatcher: Dispatcher, clock: Clock, monkeypatch) -> None:
    """Four requests: one that ends, one retried, one cancelled, one held first."""
    wall = [1.7e9]
    monkeypatch.setattr("servegym.serve.dispatcher.time.time", lambda: wall[0])

    def arrive(key, prompt, **more):
        wall[0] += 1.0
        clock.now_s += 1.0
        return dispatcher.arrive(prompt, key=key, **more)

    first = arrive("one", list(range(2000)), tenant="alice", model="m")
    dispatcher.decide(first)
    clock.now_s += 0.25
    dispatcher.first_token(first)
    dispatcher.tokens(first, 5)
    clock.now_s += 0.5
    dispatcher.usage(first, prompt_tokens=2000, cached_tokens=16)
    dispatcher.finish(first, 5)
    wall[0] += 0.75

    second = arrive("two", list(range(1500)), slo_class=1, model="m")
    dispatcher.decide(second)
    clock.now_s += 0.1
    dispatcher.decide(second)
    clock.now_s += 0.1
    dispatcher.first_token(second)
    dispatcher.finish(second, 1)
    wall[0] += 0.2

    third = arrive("three", "short", max_tokens=40)
    dispatcher.decide(third)
    dispatcher.end(third, "cancelled")
    dispatcher.end(third, "failed")  # it has ended

    fourth = arrive("four", "x")
    dispatcher.wait(fourth)
    clock.now_s += 0.05
    dispatcher.decide(fourth)
    clock.now_s += 0.2
    dispatcher.first_token(fourth)
    dispatcher.finish(fourth, 3)
    dispatcher.close()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_log_is_a_trace(tmp_path, monkeypatch, kind):
    dispatcher, clock = make(tmp_path, format=kind)
    play(dispatcher, clock, monkeypatch)
    (file,) = tmp_path.iterdir()
    assert file.suffix == f".{kind}"
    table = read_trace(file).table
    np.testing.assert_allclose(table.arrival_s, [0.0, 1.75, 2.95, 3.95])
    assert table.prompt_tokens.tolist() == [2000, 1500, 1, 1]
    assert table.output_tokens.tolist()[:2] == [5, 1]
    assert table.output_tokens[3] == 3
    assert table.slo_class.tolist() == [0, 1, 0, 0]
    assert len(set(table.tenant.tolist())) == 2
    # three whole blocks of 512 tokens, two of which are the second prompt's too
    assert table.prefix_offsets.tolist() == [0, 3, 5, 5, 5]
    assert table.prefix_keys[:2].tolist() == table.prefix_keys[3:].tolist()
    assert table.prefix_ends.tolist() == [512, 1024, 1536, 512, 1024]


def test_a_hold_and_a_rejection_are_the_same_in_logs_of_all_fleets(tmp_path, monkeypatch):
    config = DispatchConfig(
        allow_hold=True,
        allow_reject=True,
        log=DecisionLogConfig(folder=tmp_path, observations=True),
    )
    rates = Rates(prefill_tokens_per_s=1000.0, decode_step_s=0.01)
    dispatcher = Dispatcher(config, ["a", "b"], fleet_facts([rates, rates]), Clock())
    policy = dispatcher.runtime.loaded.policy
    answers = iter([2, 3])  # of two replicas: to hold, to reject
    monkeypatch.setattr(policy, "act", lambda observations, env_ids: [next(answers)])
    job = dispatcher.arrive("hello", key="one", max_tokens=8)
    assert dispatcher.decide(job)[:2] == (2, "policy")
    assert job.request.held
    assert not job.ended
    assert dispatcher.decide(job)[:2] == (3, "policy")
    assert job.ended
    dispatcher.close()
    (row,) = read_rows(tmp_path)
    assert [d["action"] for d in row["decisions"]] == [-1, -2]
    assert [d["proposed"] for d in row["decisions"]] == [-1, -2]
    data = read_dataset([tmp_path])
    assert data.action.tolist() == data.proposed.tolist() == [2, 3]
    assert data.mask.tolist() == [[True] * 4] * 2


@pytest.mark.parametrize("num_replicas", [1, 2, 1000])
def test_actions_come_back_from_the_log_as_they_were(num_replicas):
    for action in (0, num_replicas - 1, num_replicas, num_replicas + 1):
        assert mask_action(logged_action(action, num_replicas), num_replicas) == action
    assert logged_action(num_replicas, num_replicas) == LOGGED_HOLD == -1
    assert logged_action(num_replicas + 1, num_replicas) == LOGGED_REJECT == -2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_log_is_an_event_log(tmp_path, monkeypatch, kind):
    dispatcher, clock = make(tmp_path, format=kind)
    play(dispatcher, clock, monkeypatch)
    (file,) = tmp_path.iterdir()
    events = read_events(tmp_path)
    assert (np.diff(events["time_s"]) >= 0).all()
    out = outcomes_from_events(events, read_trace(file).table)
    np.testing.assert_allclose(out["first_token_s"] - out["arrival_s"], [0.25, 0.2, np.nan, 0.25])
    np.testing.assert_allclose(out["finish_s"] - out["arrival_s"], [0.75, 0.2, np.nan, 0.25])
    assert out["num_restarts"].tolist() == [0, 1, 0, 0]
    places = [row["replica"] for row in read_rows(tmp_path)]
    assert out["replica"].tolist()[:2] == places[:2]
    ttft_s, _, e2e_s = latencies(out[:2])
    np.testing.assert_allclose(ttft_s, [0.25, 0.2])
    np.testing.assert_allclose(e2e_s, [0.75, 0.2])
    np.testing.assert_allclose(out["dispatch_s"] - out["arrival_s"], [0, 0.1, 0, 0.05])


def test_rows_say_who_decided_and_why(tmp_path, monkeypatch):
    dispatcher, clock = make(tmp_path, observations=True)
    play(dispatcher, clock, monkeypatch)
    rows = list(read_rows(tmp_path))
    assert [row["key"] for row in rows] == ["one", "two", "three", "four"]
    assert [row["status"] for row in rows] == ["finished", "finished", "cancelled", "finished"]
    one = rows[0]
    assert one["cached_tokens"] == 16
    assert one["tenant_name"] == "alice"
    assert one["replica_name"] == ["a", "b"][one["replica"]]
    (decision,) = one["decisions"]
    assert decision["by"] == "policy"
    assert decision["reason"] == "policy"
    assert decision["policy"] == "round-robin"
    assert decision["action"] == one["replica"]
    seen = decision["observation"]
    assert np.shape(seen["replicas"]) == (2, 21)
    assert seen["request"][0] == 2000
    assert seen["mask"] == [True, True, True, False]
    assert [d["after_s"] for d in rows[1]["decisions"]] == pytest.approx([0.0, 0.1])
    # nobody knows how long the cancelled answer would have become: the prediction stands
    assert rows[2]["output_tokens"] == 40
    assert rows[2]["ttft_s"] is None


def follow(dispatcher: Dispatcher, clock: Clock, monkeypatch) -> None:
    """A session whose second request is retried, fails, and is sent again; then one by prompt."""
    wall = 1.7e9 - clock.now_s
    monkeypatch.setattr("servegym.serve.dispatcher.time.time", lambda: wall + clock.now_s)

    def arrive(key, prompt, **more):
        job = dispatcher.arrive(prompt, key=key, **more)
        dispatcher.decide(job)
        clock.now_s += 0.5
        dispatcher.first_token(job)
        return job

    dispatcher.finish(arrive("one", "x", session="s"), 5)  # ends at 100.5
    clock.now_s += 2.0
    failed = arrive("two", "x", session="s")
    dispatcher.decide(failed)
    dispatcher.end(failed, "failed")
    clock.now_s += 0.5
    again = arrive("three", "x", session="s")
    dispatcher.answered(again)  # at 104; the books are closed later
    clock.now_s += 0.25
    beside = arrive("four", "x", session="s")
    dispatcher.finish(again, 5)
    dispatcher.end(beside, "cancelled")
    dispatcher.finish(arrive("five", list(range(100))), 5)
    clock.now_s += 1.5
    dispatcher.finish(arrive("six", list(range(150))), 5)
    dispatcher.close()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_say_what_they_follow(tmp_path, monkeypatch, kind):
    dispatcher, clock = make(tmp_path, format=kind)
    follow(dispatcher, clock, monkeypatch)
    rows = {row["key"]: row["follows"] for row in read_rows(tmp_path)}
    assert rows == {
        "one": None,
        "two": {"key": "one", "delay_s": 2.0, "by": "session"},
        "three": {"key": "one", "delay_s": 3.0, "by": "session"},
        "four": {"key": "three", "delay_s": 0.25, "by": "session"},
        "five": None,
        "six": {"key": "five", "delay_s": 1.5, "by": "prefix"},
    }
    table = read_trace(tmp_path).table
    assert table.after.tolist() == [-1, 0, 0, 2, -1, 4]
    assert table.delay_s.tolist() == [0.0, 2.0, 3.0, 0.25, 0.0, 1.5]


def test_nothing_is_remembered_where_that_is_asked_for(tmp_path, monkeypatch):
    dispatcher, clock = make(tmp_path, max_ends=0)
    follow(dispatcher, clock, monkeypatch)
    assert all(row["follows"] is None for row in read_rows(tmp_path))


def test_files_rotate_and_the_oldest_go(tmp_path):
    log = DecisionLog(DecisionLogConfig(folder=tmp_path, max_file_rows=10, max_files=3))
    for i in range(95):
        log.put({"i": i, "decisions": []})
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    kept = [json.loads(line)["i"] for file in files for line in file.read_text().splitlines()]
    assert kept == list(range(70, 95))
    assert (log.num_written, log.num_dropped) == (95, 0)


def test_a_log_that_cannot_keep_up_drops_rows_and_counts_them(tmp_path, monkeypatch):
    go = threading.Event()
    real = json.dumps

    def slow(*args, **kwargs):
        go.wait(5)
        return real(*args, **kwargs)

    monkeypatch.setattr("servegym.serve.log_files.json.dumps", slow)
    log = DecisionLog(DecisionLogConfig(folder=tmp_path, max_queue=10))
    for i in range(100):
        log.put({"i": i, "decisions": []})
    assert 85 <= log.num_dropped <= 90
    go.set()
    log.close()
    assert log.num_written + log.num_dropped == 100


def test_rows_that_cannot_be_written_are_dropped_and_counted(tmp_path):
    log = DecisionLog(DecisionLogConfig(folder=tmp_path))
    log.put({"i": float("nan"), "decisions": []})
    log.put({"i": 1, "decisions": []})
    log.close()
    assert (log.num_written, log.num_dropped) == (1, 1)


class FullDisk:
    """Lets files take so many bytes in all; more is what a full disk says."""

    def __init__(self, monkeypatch, room):
        self.room = room
        real = Path.open

        def opened(path, *args, **kwargs):
            return SmallFile(self, real(path, *args, **kwargs))

        monkeypatch.setattr("servegym.serve.log_files.Path.open", opened)


class SmallFile:
    def __init__(self, disk, file):
        self.disk, self.file = disk, file

    def write(self, data):
        if not self.disk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = data[: self.disk.room]
        self.disk.room -= len(taken)
        return self.file.write(taken)

    def close(self):
        self.file.close()


def rows_in(folder):
    files = sorted(folder.iterdir())
    return [json.loads(line)["i"] for file in files for line in file.read_bytes().splitlines()]


def test_a_full_disk_is_said_once_and_loses_nothing_that_fits_the_queue(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("servegym.serve.decision_log._FLUSH_S", 0.01)
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, room=200)  # ends within a line
        log = DecisionLog(DecisionLogConfig(folder=tmp_path, max_queue=1000))
        for i in range(100):
            log.put({"i": i, "decisions": []})
        wait_for(lambda: log.num_failed >= 3)
        assert log.num_written == 8  # lines of 24 bytes
        for i in range(100, 200):
            log.put({"i": i, "decisions": []})
        disk.room = 1_000_000
        wait_for(lambda: log.num_written == 200)
        log.close()
    assert rows_in(tmp_path) == list(range(200))
    assert log.num_dropped == 0
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "cannot be written ([Errno 28] No space left on device): rows wait" in said[0]
    assert said[1] == "the decision log is written again; 0 rows were lost"


def test_beyond_the_queue_a_full_disk_costs_rows_which_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("servegym.serve.decision_log._FLUSH_S", 0.01)
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, room=0)
        log = DecisionLog(DecisionLogConfig(folder=tmp_path, max_queue=10))
        log.put({"i": 0, "decisions": []})
        wait_for(lambda: log.num_failed)
        for i in range(1, 31):
            log.put({"i": i, "decisions": []})
        assert log.num_dropped == 20
        disk.room = 1_000_000
        wait_for(lambda: log.num_written == 11)
        log.close()
    assert rows_in(tmp_path) == list(range(11))
    assert (log.num_written, log.num_dropped) == (11, 20)


def test_a_disk_that_stays_full_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("servegym.serve.decision_log._FLUSH_S", 0.01)
    with monkeypatch.context() as patch:
        FullDisk(patch, room=0)
        log = DecisionLog(DecisionLogConfig(folder=tmp_path, max_queue=10))
        for i in range(10):
            log.put({"i": i, "decisions": []})
        wait_for(lambda: log.num_failed)
        begin_s = time.monotonic()
        log.close()
        assert time.monotonic() - begin_s < 5.0
    assert (log.num_written, log.num_dropped) == (0, 10)


def test_a_read_only_disk_is_a_full_one(tmp_path, monkeypatch):
    monkeypatch.setattr("servegym.serve.decision_log._FLUSH_S", 0.01)

    def refused(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("servegym.serve.log_files.Path.open", refused)
        log = DecisionLog(DecisionLogConfig(folder=tmp_path))
        log.put({"i": 0, "decisions": []})
        wait_for(lambda: log.num_failed)
    wait_for(lambda: log.num_written == 1)
    log.close()
    assert rows_in(tmp_path) == [0]


def test_a_parquet_file_that_cannot_go_on_is_lost_and_the_next_one_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("servegym.serve.decision_log._FLUSH_S", 0.01)
    pq = pytest.importorskip("pyarrow.parquet")
    real, writes = pq.ParquetWriter.write_table, []

    def full_once(self, table, *args):
        writes.append(len(table))
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, table, *args)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full_once)
    monkeypatch.setattr("servegym.serve.log_files.Parquet.GROUP", 10)
    log = DecisionLog(DecisionLogConfig(folder=tmp_path, format="parquet"))
    for i in range(20):
        log.put({"key": str(i), "decisions": []})
    wait_for(lambda: len(writes) == 3)
    log.close()
    (file,) = tmp_path.iterdir()
    assert [row["key"] for row in read_rows(file)] == [str(i) for i in range(10, 20)]
    assert (log.num_written, log.num_dropped) == (10, 10)


def test_a_line_that_a_full_disk_cut_short_is_taken_back_at_the_end(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # cuts a write, refuses the next
    try:
        log = DecisionLog(DecisionLogConfig(folder=tmp_path, max_queue=100_000))
        for i in range(150):
            log.put({"i": i, "padding": "x" * 1000, "decisions": []})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    kept = [row["i"] for row in read_rows(tmp_path)]  # every line can be read
    assert 50 < len(kept) < 150
    assert kept == list(range(len(kept)))
    assert (log.num_written, log.num_dropped) == (len(kept), 150 - len(kept))


def test_a_clock_that_is_set_back_does_not_make_the_newest_file_the_oldest(tmp_path, monkeypatch):
    hour = [14]
    monkeypatch.setattr(
        "servegym.serve.log_files.time.gmtime", lambda: (2026, 12, 1, hour[0], 0, 0, 1, 335, 0)
    )
    log = DecisionLog(DecisionLogConfig(folder=tmp_path, max_file_rows=10, max_files=3))
    for i in range(95):
        if i == 50:
            wait_for(lambda: log.num_written == 50)
            hour[0] = 9
        log.put({"i": i, "decisions": []})
    log.close()
    assert sorted(row["i"] for row in read_rows(tmp_path)) == list(range(70, 95))


def test_arrivals_keep_their_distances_where_the_clock_is_set_anew(tmp_path, monkeypatch):
    dispatcher, clock = make(tmp_path)
    for jump_s in (0.0, -3600.0, 7200.0):
        monkeypatch.setattr("servegym.serve.dispatcher.time.time", lambda jump_s=jump_s: jump_s)
        clock.now_s += 5.0
        dispatcher.end(dispatcher.arrive("x", key=f"at {jump_s}"), "cancelled")
    dispatcher.close()
    at_s = [row["arrival_s"] for row in read_rows(tmp_path)]
    assert np.diff(at_s).tolist() == pytest.approx([5.0, 5.0])


def wait_for(condition, timeout_s=10.0):
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.002)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: give a folder for the log"):
        DecisionLog(DecisionLogConfig(folder=tmp_path / "file" / "log"))


def test_other_files_are_no_log(tmp_path):
    (tmp_path / "requests-1.jsonl").write_text('{"arrival_s": 0}\n')
    with pytest.raises(WorkloadError, match="line 1 is no row of a decision log"):
        read_events(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkloadError, match="has no request"):
        read_events(tmp_path / "empty")
