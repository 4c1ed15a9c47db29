"""The router's metrics page, read by Prometheus' own parser and, where it is there, its linter."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Mapping

import pytest
from aiohttp import ClientError
from prometheus_client.parser import text_string_to_metric_families

from servegym import __version__
from servegym.serve.monitoring.loop_lag import LAG_S, LoopLag
from servegym.serve.monitoring.prometheus import Exposition, Histogram, observe_all
from servegym.serve.router.latencies import Latencies

from ..running import run, running, until  # noqa: TID252 - tests are no package

BODY = {"model": "m", "prompt": "hello there", "max_tokens": 5}
STREAM = {**BODY, "stream": True}
COUNT = "servegym_replica_ttft_seconds_count"
ALICE, BOB = "alice-has-a-long-key", "bob-has-a-long-key-too"


class Page:
    """A page as Prometheus reads it."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def __getitem__(self, asked: tuple[str, Mapping[str, str]]) -> float:
        name, labels = asked
        (found,) = [s for s in self.samples if s.name == name and s.labels == dict(labels)]
        return found.value

    def values(self, name: str, label: str) -> dict[str, float]:
        return {s.labels[label]: s.value for s in self.samples if s.name == name}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_requests_are_counted_by_replica_and_by_the_tenants_that_are_configured(
    monkeypatch, num_workers
):
    monkeypatch.setenv("KEYS", f"alice={ALICE},bob={BOB}")
    settings = {"auth": {"keys_env": "KEYS"}, "tenants": {"alice": {}}}

    async def test() -> None:
        async with running(num_workers=num_workers, **settings) as it:
            answered: Counter[str] = Counter()
            asked = ((ALICE, STREAM), (ALICE, STREAM), (BOB, STREAM), (BOB, BODY))
            for i, (key, body) in enumerate(asked):
                headers = {"Authorization": f"Bearer {key}"}
                worker = i % max(1, num_workers)
                status, _, got = await it.post(body, worker=worker, headers=headers)
                assert status == 200
                answered[got["X-Servegym-Replica"]] += 1
            _, text = await it.get("/metrics", headers={"Authorization": f"Bearer {ALICE}"})
        page = Page(text)
        assert page.values("servegym_replica_e2e_seconds_count", "replica") == answered
        assert page.values("servegym_tenant_e2e_seconds_count", "tenant") == {
            "alice": 2,
            "other": 2,
        }
        # of streams alone the first token is seen; five tokens have four gaps
        assert page.values("servegym_tenant_ttft_seconds_count", "tenant") == {
            "alice": 2,
            "other": 1,
        }
        assert page.values("servegym_tenant_itl_seconds_count", "tenant") == {
            "alice": 8,
            "other": 4,
        }
        assert page["servegym_router_itl_seconds_count", {}] == 12
        assert page["servegym_router_queue_seconds_count", {}] == 4
        assert page.values("servegym_tenant_outcomes_total", "tenant") == {"alice": 2, "other": 2}
        # the engine reports 7 and 5 tokens where it is asked to, in the answer that is no stream
        tokens = {
            (s.labels["tenant"], s.labels["kind"]): s.value
            for s in page.samples
            if s.name == "servegym_tenant_tokens_total"
        }
        assert tokens["alice", "output"] == 10
        assert tokens["other", "output"] == 10
        assert "bob" not in text

    run(test)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_times_are_those_of_the_streams(num_workers):
    async def test() -> None:
        async with running(1, num_workers) as it:
            it.replicas[0].script = [
                b'data: {"choices": [{"text": "a"}]}\n\n',
                0.06,
                b'data: {"choices": [{"text": "b"}]}\n\ndata: {"choices": [{"text": "c"}]}\n\n',
                b"data: [DONE]\n\n",
            ]
            await it.post(STREAM)
            _, text = await it.get("/metrics")
        page = Page(text)
        one = {"replica": "r0"}
        assert page["servegym_replica_itl_seconds_count", one] == 2  # the gap, and what came with b
        assert 0.05 < page["servegym_replica_itl_seconds_sum", one] < 1
        assert page["servegym_replica_itl_seconds_bucket", {**one, "le": "0.005"}] == 1
        ttft_s = page["servegym_router_ttft_seconds_sum", {}]
        e2e_s = page["servegym_router_e2e_seconds_sum", {}]
        itl_s = page["servegym_router_itl_seconds_sum", {}]
        assert e2e_s >= ttft_s + itl_s - 1e-6
        assert 0 < page["servegym_router_queue_seconds_sum", {}] < ttft_s

    run(test)


def test_a_hold_is_time_queued_at_the_router():
    async def test() -> None:
        async with running(1, request={"max_hold_s": 5.0, "hold_s": 0.05}) as it:
            it.router._health.drain(0, True)
            answer = asyncio.create_task(it.post(STREAM))
            await until(lambda: it.state.num_held == 1)
            it.router._health.drain(0, False)
            status, _, _ = await answer
            assert status == 200
            queue = it.router.telemetry.latencies.total(lambda times: times.queue)
            assert queue.count == 1
            assert queue.total >= 0.05

    run(test)


@pytest.mark.parametrize(
    ("limits", "mode", "body", "met"),
    [
        ({"ttft_s": 5.0, "tpot_s": 5.0}, "ok", STREAM, "yes"),
        ({"ttft_s": 1e-9}, "ok", STREAM, "no"),
        ({"tpot_s": 1e-9}, "ok", STREAM, "no"),
        ({"ttft_s": 5.0}, "ok", BODY, "yes"),
        ({"ttft_s": 1e-9, "tpot_s": 1e-9}, "ok", BODY, "no"),
        ({"ttft_s": 5.0}, "die", STREAM, "no"),
        ({"ttft_s": 5.0}, 503, STREAM, "no"),
        ({"ttft_s": 5.0}, 400, STREAM, None),  # the client's fault
        ({}, "ok", STREAM, None),  # nothing is promised
    ],
)
def test_requests_meet_the_limits_of_their_class_or_not(limits, mode, body, met):
    async def test() -> None:
        level = {"name": "chat", **limits}
        async with running(1, dispatch={"slo_classes": [level]}) as it:
            it.replicas[0].mode = mode
            with contextlib.suppress(ClientError):
                await it.post(body)
            await until(it.idle)
            _, text = await it.get("/metrics")
        want = {"yes": float(met == "yes"), "no": float(met == "no")} if limits else {}
        assert Page(text).values("servegym_slo_requests_total", "met") == want

    run(test)


def test_the_page_is_what_prometheus_expects(tmp_path):
    async def test() -> str:
        async with running(request={"max_hold_s": 0.0}) as it:
            await it.post(STREAM)
            it.replicas[0].mode = it.replicas[1].mode = "die"
            with pytest.raises(ClientError):
                await it.post(STREAM)
            return (await it.get("/metrics"))[1]

    text = asyncio.run(test())
    page = Page(text)
    names = [family.name for family in page.families]
    assert len(names) == len(set(names)) > 30
    assert [f.name for f in page.families if f.type == "unknown" or not f.documentation] == []
    series = [(s.name, tuple(sorted(s.labels.items()))) for s in page.samples]
    assert len(series) == len(set(series))
    histograms = [family for family in page.families if family.type == "histogram"]
    assert {"servegym_replica_itl_seconds", "servegym_event_loop_lag_seconds"} <= {
        family.name for family in histograms
    }
    # one that Prometheus' client reports of every process, of each kind
    assert {"process_resident_memory_bytes", "python_info", "python_gc_collections"} <= set(names)
    assert page["servegym_build_info", {"version": __version__}] == 1
    if promtool := shutil.which("promtool"):
        linter = [promtool, "check", "metrics"]
        said = subprocess.run(linter, input=text, capture_output=True, text=True, timeout=20)
        assert (said.returncode, said.stdout + said.stderr) == (0, "")


def test_workers_say_how_late_they_are_and_what_they_use():
    async def test() -> None:
        async with running(1, 2) as it:
            await until(lambda: it.router._decider.lag.count > 3)
            page = Page((await it.get("/metrics"))[1])
        assert page["servegym_worker_event_loop_lag_seconds_count", {}] > 3
        mine = {"pid": str(os.getpid())}  # here they are one process, and so are listed once
        open_files = page["servegym_worker_process_open_fds", mine]
        assert 10 < open_files < page["servegym_worker_process_max_fds", mine]
        assert page["servegym_worker_process_cpu_seconds_total", mine] > 0.1

    run(test)


def test_labels_are_escaped_as_the_format_says():
    page = Exposition({"of": 'a "b"\n\\c'})
    page.gauge("x", "Text", 1.0)
    ((sample,),) = [family.samples for family in text_string_to_metric_families(page.page())]
    assert sample.labels == {"of": 'a "b"\n\\c'}


def test_histograms_add_up_to_that_of_all_values():
    a, b, both = Histogram((1.0, 2.0)), Histogram((1.0, 2.0)), Histogram((1.0, 2.0))
    for histogram, value in ((a, 0.5), (a, 3.0), (b, 1.0), (b, 1.5)):
        histogram.observe(value)
        both.observe(value)
    a.add(b)
    assert a.cumulative() == both.cumulative() == [("1", 2), ("2", 3), ("+Inf", 4)]
    assert a.total == both.total == 6.0


def test_value_of_several_histograms_is_counted_in_each_as_if_alone():
    a, b, alone = Histogram((1.0, 2.0)), Histogram((1.0, 2.0)), Histogram((1.0, 2.0))
    b.observe(3.0)
    for value, count in ((1.0, 1), (1.5, 2)):
        observe_all((a, b), value, count)
        alone.observe(value, count)
    assert a.cumulative() == alone.cumulative() == [("1", 1), ("2", 3), ("+Inf", 3)]
    assert b.cumulative() == [("1", 1), ("2", 3), ("+Inf", 4)]
    assert (a.total, b.total) == (alone.total, 7.0) == (4.0, 7.0)


def test_a_replica_that_is_gone_has_no_series_but_what_it_did_still_counts():
    latencies = Latencies({"alice"})
    for replica, tenant, ttft_s in (("a", "alice", 1.0), ("b", "alice", 2.0), ("b", "bob", 4.0)):
        for times in latencies.of(replica, tenant):
            times.ttft.observe(ttft_s)
    for gone, replicas in (("x", ["a", "b"]), ("b", ["a"]), ("b", ["a"])):
        latencies.forget(gone)
        page = Exposition()
        latencies.write(page)
        read = Page(page.page())
        assert read["servegym_router_ttft_seconds_sum", {}] == 7.0
        assert read.values("servegym_tenant_ttft_seconds_sum", "tenant") == {
            "alice": 3.0,
            "other": 4.0,
        }
        want = {"a": 1.0, "b": 6.0}
        found = read.values("servegym_replica_ttft_seconds_sum", "replica")
        assert found == {name: want[name] for name in replicas}


def test_the_series_of_a_replica_end_with_its_last_request():
    async def test() -> None:
        async with running(2) as it:
            for replica in it.replicas:
                replica.gap_s = 0.2
            answers = [asyncio.create_task(it.post(STREAM)) for _ in range(2)]
            await until(lambda: all(replica.sent for replica in it.replicas))
            it.router.fleet.remove("r0")
            leaving = Page((await it.get("/metrics"))[1])
            assert {"r0", "r1"} == leaving.values(COUNT, "replica").keys()
            assert [status for status, _, _ in await asyncio.gather(*answers)] == [200, 200]
            await until(lambda: not it.router.fleet.leaving)
            gone = Page((await it.get("/metrics"))[1])
        assert gone.values(COUNT, "replica") == {"r1": 1}
        assert gone["servegym_router_ttft_seconds_count", {}] == 2
        assert gone["servegym_router_itl_seconds_count", {}] == 8  # of both, to their ends
        assert not any("r0" in sample.labels.values() for sample in gone.samples)

    run(test)


def test_a_loop_that_is_held_up_is_seen():
    async def test() -> Histogram:
        lags = Histogram(LAG_S)
        lag = LoopLag(lags.observe)
        lag.start()
        await asyncio.sleep(0.05)
        time.sleep(0.2)  # what no one should do on a loop
        await asyncio.sleep(0.01)
        lag.stop()
        return lags

    lag = asyncio.run(test())
    assert lag.count == 1
    assert 0.1 < lag.total < 2.0  # due after 0.1 s, looked at after 0.25 s
