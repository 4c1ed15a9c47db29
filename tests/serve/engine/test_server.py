"""The emulated engine over HTTP: what clients, routers and operators see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import time

import aiohttp
import pytest

from servegym.errors import ConfigError
from servegym.scenario import parse_scenario
from servegym.scenario.fleet import SpeculativeConfig
from servegym.serve.engine.content import answer_text, request_digest
from servegym.serve.engine.faults import Fault
from servegym.serve.engine.fleet import Fleet, FleetConfig

SCENARIO = """
name: two
model: Llama-3.1-8B
engine: {{block_size: 16, max_num_batched_tokens: 512, max_num_seqs: {seqs}}}
fleet:
  - {{gpu: H100-SXM-80GB, count: 2, num_blocks: {blocks}}}
workload: {{kind: generated, rate_rps: 1.0, output: {{medians_tokens: [40.0], max_tokens: 80}}}}
"""
HUGE = {"replica": 0, "kind": "slow", "value": float("inf")}
STEP_S = 0.01  # a decode step of this model on this GPU takes a little less


@contextlib.asynccontextmanager
async def serving(*, seqs=32, blocks=400, **settings):
    """A fleet on free ports and a session of clients."""
    scenario = parse_scenario(SCENARIO.format(seqs=seqs, blocks=blocks), "test")
    settings = {"speed": 20.0, "port": 0, "admin_port": 0, **settings}
    fleet = Fleet(FleetConfig(scenario, **settings))
    await fleet.start()
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(connector=connector) as session:
            yield fleet, session
    finally:
        await fleet.stop()


def run(test):
    asyncio.run(asyncio.wait_for(test, 120))  # the first one may have to compile an engine


async def ask(session, server, path="completions", headers=None, **body):
    async with session.post(f"{server.url}/v1/{path}", json=body, headers=headers) as response:
        return response.status, await response.json()


async def events(response):
    """The events of a stream, as objects; the last must be [DONE]."""
    found = []
    async for line in response.content:
        if line.startswith(b"data: "):
            found.append(line[6:].strip())
    assert found.pop() == b"[DONE]"
    return [json.loads(event) for event in found]


async def until(condition, timeout_s=10.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def metric(session, server, name):
    async with session.get(f"{server.url}/metrics") as response:
        assert response.status == 200
        page = await response.text()
    values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    assert values, name
    return float(values[0])


def expected(prompt, tokens, seed=None):
    return answer_text(request_digest(prompt, seed), tokens)


@pytest.mark.parametrize("interval", [1, 7])
def test_stream_has_every_token_once_then_the_reason_the_usage_and_the_end(interval):
    async def test():
        # slower than in the others, so that a busy machine is in time for most steps
        async with serving(stream_interval=interval, speed=0.5) as (fleet, session):
            body = {
                "prompt": "hello there",
                "max_tokens": 50,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            url = f"{fleet.servers[1].url}/v1/completions"
            async with session.post(url, json=body) as response:
                assert response.status == 200
                assert response.content_type == "text/event-stream"
                *parts, usage = await events(response)
        texts = [part["choices"][0]["text"] for part in parts]
        assert "".join(texts) == expected("hello there", 50)
        assert len(texts) > 50 / interval / 3  # late steps may share an event
        assert [p["choices"][0]["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + [
            "length"
        ]
        assert usage["choices"] == []
        assert usage["usage"]["prompt_tokens"] == 3
        assert usage["usage"]["completion_tokens"] == 50
        assert {part["system_fingerprint"] for part in parts} == {"replica-1"}
        assert len({part["id"] for part in parts}) == 1

    run(test())


def test_chat_stream_names_the_role_first_and_says_what_the_whole_answer_says():
    async def test():
        async with serving() as (fleet, session):
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12}
            server = fleet.servers[0]
            status, whole = await ask(session, server, "chat/completions", **body)
            assert status == 200
            url = f"{server.url}/v1/chat/completions"
            async with session.post(url, json={**body, "stream": True}) as response:
                parts = await events(response)
        deltas = [part["choices"][0]["delta"] for part in parts]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(d["content"] for d in deltas) == whole["choices"][0]["message"]["content"]
        assert whole["object"] == "chat.completion"
        assert {part["object"] for part in parts} == {"chat.completion.chunk"}

    run(test())


def test_the_role_comes_with_the_first_output_and_not_before():
    async def test():
        async with serving() as (fleet, session):
            server = fleet.servers[0]
            await fleet.apply(Fault(0, "hang"))
            messages = [{"role": "user", "content": "hi"}]
            for tokens in (1, 5):
                body = {"messages": messages, "max_tokens": tokens, "stream": True}
                url = f"{server.url}/v1/chat/completions"
                async with session.post(url, json=body) as response:
                    first = asyncio.create_task(response.content.readline())
                    await until(lambda: server.state()["num_waiting"] == 1)
                    await asyncio.sleep(0.05)
                    assert not first.done()
                    await fleet.apply(Fault(0, "recover"))
                    role = json.loads((await first)[6:])
                    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
                    deltas = [x["choices"][0]["delta"] for x in await events(response)]
                    assert not any("role" in delta for delta in deltas)
                    assert "".join(d["content"] for d in deltas).count(" ") == tokens
                await fleet.apply(Fault(0, "hang"))

    run(test())


def test_answer_length_comes_from_the_workload_the_field_or_the_header_and_the_limit_cuts_it():
    async def test():
        async with serving() as (fleet, session):
            one, two = fleet.servers.values()
            lengths = set()
            for i in range(12):
                _, a = await ask(session, one, prompt=f"request {i}", max_tokens=500)
                _, b = await ask(session, two, prompt=f"request {i}", max_tokens=500)
                assert a["choices"] == b["choices"]  # the same answer, whoever gives it
                assert a["choices"][0]["finish_reason"] == "stop"
                lengths.add(a["usage"]["completion_tokens"])
            assert len(lengths) > 5
            assert max(lengths) <= 80
            _, a = await ask(session, one, prompt="x", max_tokens=500, output_tokens=123)
            header = {"X-Output-Tokens": "123"}
            _, b = await ask(session, one, headers=header, prompt="x", max_tokens=500)
            assert a["choices"] == b["choices"]
            assert a["usage"]["completion_tokens"] == 123
            _, c = await ask(session, one, prompt="x", output_tokens=123)
            assert c["usage"]["completion_tokens"] == 16  # OpenAI's default limit
            assert c["choices"][0]["finish_reason"] == "length"

    run(test())


def test_client_that_leaves_aborts_its_request_and_frees_its_blocks():
    async def test():
        async with serving(speed=1.0) as (fleet, session):
            server = fleet.servers[0]
            body = {"prompt": "x" * 4000, "max_tokens": 2000, "ignore_eos": True, "stream": True}
            response = await session.post(f"{server.url}/v1/completions", json=body)
            await response.content.readline()
            assert server.state()["kv_cache_usage"] > 0.1
            response.close()
            await until(lambda: server.state()["num_running"] == 0)
            assert server.state()["kv_cache_usage"] == 0
            assert server.state()["num_streams"] == 0
            task = asyncio.create_task(ask(session, server, **{**body, "stream": False}))
            await until(lambda: server.state()["num_running"] == 1)
            task.cancel()
            await until(lambda: server.state()["num_running"] == 0)
            page = 'vllm:request_success_total{model_name="Llama-3.1-8B",engine="0",finished_'
            async with session.get(f"{server.url}/metrics") as metrics:
                assert f'{page}reason="abort"}} 2.0' in await metrics.text()

    run(test())


def test_urgent_request_overtakes_those_that_wait():
    async def test():
        # slow enough for the others to wait before the first has ended, on a busy machine too
        async with serving(seqs=1, speed=2.0) as (fleet, session):
            server, order = fleet.servers[0], []

            async def one(priority):
                await ask(
                    session,
                    server,
                    prompt=f"p{priority}",
                    max_tokens=60,
                    ignore_eos=True,
                    priority=priority,
                )
                order.append(priority)

            first = asyncio.create_task(one(0))
            await until(lambda: server.state()["num_running"] == 1)
            others = [asyncio.create_task(one(p)) for p in (5, 1, 3, -2)]
            await asyncio.gather(first, *others)
            assert order == [0, -2, 1, 3, 5]

    run(test())


def test_full_cache_preempts_and_everything_still_ends():
    async def test():
        async with serving(blocks=20) as (fleet, session):
            server = fleet.servers[0]
            answers = await asyncio.gather(
                *(
                    ask(session, server, prompt=f"{i:08}", max_tokens=120, ignore_eos=True)
                    for i in range(6)
                )
            )
            for i, (status, answer) in enumerate(answers):
                assert status == 200
                assert answer["choices"][0]["text"] == expected(f"{i:08}", 120)
            assert await metric(session, server, "vllm:num_preemptions_total") > 0
            assert await metric(session, server, "vllm:kv_cache_usage_perc") == 0
            assert await metric(session, server, "vllm:generation_tokens_total") == 720
            assert await metric(session, server, "vllm:inter_token_latency_seconds_count") == 714
            assert await metric(session, server, "vllm:time_to_first_token_seconds_count") == 6

    run(test())


def test_next_turn_of_a_conversation_finds_prompt_and_answer_in_the_cache():
    async def test():
        async with serving() as (fleet, session):
            server = fleet.servers[0]
            talk = [{"role": "user", "content": "tell me " * 40}]
            _, first = await ask(session, server, "chat/completions", messages=talk)
            assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            talk += [
                {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
                {"role": "user", "content": "more"},
            ]
            _, second = await ask(session, server, "chat/completions", messages=talk)
            cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
            used = first["usage"]["total_tokens"]
            assert used - 17 <= cached <= used
            assert await metric(session, server, "vllm:prefix_cache_hits_total") == cached
            queries = await metric(session, server, "vllm:prefix_cache_queries_total")
            assert queries == sum(x["usage"]["prompt_tokens"] for x in (first, second))

    run(test())


def test_an_image_is_a_thousand_tokens_and_found_in_the_cache():
    async def test():
        async with serving() as (fleet, session):
            server = fleet.servers[0]

            async def see(data):
                image = {"type": "image_url", "image_url": {"url": f"data:;base64,{data}"}}
                parts = [{"type": "text", "text": "look: "}, image]
                talk = [{"role": "user", "content": parts}]
                status, said = await ask(session, server, "chat/completions", messages=talk)
                assert status == 200
                usage = said["usage"]
                return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

            first = await see("A" * 300_000)
            assert 1000 < first[0] < 1020
            assert first[1] == 0
            again, other = await see("A" * 300_000), await see("B" * 30)
            assert again[0] == other[0] == first[0]
            assert again[1] > 900
            assert other[1] < 16
            wrong = [{"role": "user", "content": [{"type": "hologram"}]}]
            status, said = await ask(session, server, "chat/completions", messages=wrong)
            assert status == 400
            assert "image_url" in said["error"]["message"]

    run(test())


def test_metrics_count_running_and_waiting_and_describe_the_cache():
    async def test():
        async with serving(seqs=2, speed=1.0) as (fleet, session):
            server = fleet.servers[0]
            tasks = [
                asyncio.create_task(
                    ask(session, server, prompt=f"{i}", max_tokens=900, ignore_eos=True)
                )
                for i in range(5)
            ]
            await until(lambda: server.state()["num_running"] == 2)
            await until(lambda: server.state()["num_waiting"] == 3)
            assert await metric(session, server, "vllm:num_requests_running") == 2
            assert await metric(session, server, "vllm:num_requests_waiting") == 3
            assert 0 < await metric(session, server, "vllm:kv_cache_usage_perc") < 1
            async with session.get(f"{server.url}/metrics") as response:
                page = await response.text()
            assert 'block_size="16",num_gpu_blocks="400"' in page
            assert 'model_name="Llama-3.1-8B"' in page
            for task in tasks:
                task.cancel()

    run(test())


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "Invalid JSON"),
        (b"[]", 400, "object"),
        (b'{"max_tokens": 4}', 400, "prompt"),
        (b'{"prompt": "x", "n": 2}', 400, "n: Input should be 1"),
        (b'{"prompt": "x", "max_tokens": 0}', 400, "max_tokens"),
        (b'{"prompt": "x", "max_tokens": 6400, "ignore_eos": true}', 200, ""),
        (b'{"prompt": "x", "max_tokens": 6401}', 400, "room for 6400"),
        (b'{"prompt": ["x", "y"]}', 400, "prompt"),
        (b'{"prompt": "x", "model": "other"}', 404, "'other' is not 'Llama-3.1-8B'"),
        (b'{"prompt": "' + b"x" * 9_000_000 + b'"}', 413, "8388608 bytes"),
        (b'{"prompt": "' + b"x" * 100_000 + b'"}', 400, "room for 0"),
        (b'{"prompt": "\xff"}', 400, ""),
        (
            b'{"prompt": "x", "stream": null, "stream_options": null, "max_tokens": null,'
            b'"n": null, "seed": null, "ignore_eos": null, "priority": null, "model": null,'
            b'"stop": null}',
            200,
            "",
        ),
        (b'{"prompt": "x", "max_tokens": 16.0}', 200, ""),
        *(
            (b'{"prompt": "x", "%b": %b}' % (field, number), 400, field.decode())
            for field in (b"max_tokens", b"output_tokens", b"seed", b"priority")
            for number in (b"9" * 400, b"1e400", b"-1e400", b"NaN", b"Infinity")
        ),
        (b'{"prompt": "x", "max_tokens": %b}' % (b"9" * 5000), 400, "number out of range"),
        (b'{"prompt": [%b]}' % (b"9" * 400), 400, "prompt"),
        (b'{"prompt": %b}' % (b"[" * 100_000), 400, ""),
    ],
)
def test_wrong_bodies_get_a_status_and_a_sentence(body, status, said):
    async def test():
        async with serving(speed=2000.0) as (fleet, session):
            url = f"{fleet.servers[0].url}/v1/completions"
            async with session.post(url, data=body) as response:
                answer = await response.json()
                assert response.status == status, answer
            if status != 200:
                assert said in answer["error"]["message"]
                assert answer["error"]["code"] == status
            assert fleet.servers[0].state()["num_streams"] == 0

    run(test())


def test_prompts_come_as_text_or_ids_alone_or_in_a_list_of_one():
    async def test():
        async with serving() as (fleet, session):
            for prompt, tokens in (("abcde", 2), (["abcde"], 2), ([7, 8, 9], 3), ([[7, 8, 9]], 3)):
                status, answer = await ask(session, fleet.servers[0], prompt=prompt)
                assert status == 200
                assert answer["usage"]["prompt_tokens"] == tokens

    run(test())


def test_slow_fault_stretches_steps_and_recovery_ends_it():
    async def test():
        async with serving() as (fleet, session):
            server, loop = fleet.servers[0], asyncio.get_running_loop()

            async def mean_step_s():
                before = await metric(session, server, "vllm:inter_token_latency_seconds_sum")
                await ask(session, server, prompt=f"{loop.time()}", max_tokens=21, ignore_eos=True)
                after = await metric(session, server, "vllm:inter_token_latency_seconds_sum")
                return (after - before) / 20

            usual_s = await mean_step_s()
            await fleet.apply(Fault(0, "slow", 10.0))
            assert server.state()["faults"] == ["slow=10"]
            assert await mean_step_s() == pytest.approx(10 * usual_s, rel=1e-3)
            await fleet.apply(Fault(0, "recover"))
            assert await mean_step_s() == pytest.approx(usual_s, rel=1e-3)

    run(test())


def test_hang_holds_streams_back_and_recovery_goes_on_with_them():
    async def test():
        async with serving() as (fleet, session):
            server = fleet.servers[0]
            await fleet.apply(Fault(0, "hang"))
            task = asyncio.create_task(ask(session, server, prompt="x"))
            await until(lambda: server.state()["num_waiting"] == 1)
            await asyncio.sleep(0.1)
            assert not task.done()
            async with session.get(f"{server.url}/health") as response:
                assert response.status == 200
            assert await metric(session, server, "vllm:num_requests_waiting") == 1
            await fleet.apply(Fault(0, "recover"))
            assert (await task)[0] == 200

    run(test())


def test_failed_replica_drops_its_streams_takes_no_connection_and_comes_back_on_its_port():
    async def test():
        async with serving(speed=1.0) as (fleet, session):
            server, other = fleet.servers.values()
            body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
            async with session.post(f"{server.url}/v1/completions", json=body) as response:
                await response.content.readline()
                await fleet.apply(Fault(0, "fail"))
                with pytest.raises(aiohttp.ClientError):
                    await response.content.read()
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get(f"{server.url}/health")
            assert (await ask(session, other, prompt="x"))[0] == 200
            url = server.url
            await fleet.apply(Fault(0, "recover"))
            assert server.url == url
            assert (await ask(session, server, prompt="x"))[0] == 200
            assert server.state()["num_streams"] == 0

    run(test())


def test_draining_replica_ends_what_it_has_and_refuses_what_is_new():
    async def test():
        async with serving() as (fleet, session):
            server = fleet.servers[0]
            task = asyncio.create_task(ask(session, server, prompt="x", max_tokens=100))
            await until(lambda: server.state()["num_running"] == 1)
            await fleet.apply(Fault(0, "drain"))
            assert (await ask(session, server, prompt="y"))[0] == 503
            async with session.get(f"{server.url}/health") as response:
                assert response.status == 503
            assert (await task)[0] == 200

    run(test())


def test_metrics_can_be_gone_or_stand_still():
    async def test():
        async with serving() as (fleet, session):
            server = fleet.servers[0]
            await fleet.apply(Fault(0, "metrics-frozen"))
            await ask(session, server, prompt="x")
            assert await metric(session, server, "vllm:generation_tokens_total") == 0
            await fleet.apply(Fault(0, "recover"))
            assert await metric(session, server, "vllm:generation_tokens_total") == 16
            await fleet.apply(Fault(0, "metrics-off"))
            async with session.get(f"{server.url}/metrics") as response:
                assert response.status == 503

    run(test())


def test_faults_come_by_the_switch_and_by_the_clock():
    async def test():
        planned = (Fault(1, "drain", at_s=0.0),)
        async with serving(faults=planned) as (fleet, session):
            await until(lambda: fleet.servers[1].state()["faults"] == ["drain"])
            url = f"{fleet.admin_url}/faults"
            slow = {"replica": 0, "kind": "slow", "value": 4}
            async with session.post(url, json=slow) as response:
                state = await response.json()
            assert [s["faults"] for s in state] == [["slow=4"], ["drain"]]
            for wrong in (
                {"replica": 0, "kind": "sow"},
                {"replica": 7, "kind": "hang"},
                [],
                "x",
                HUGE,
            ):
                async with session.post(url, json=wrong) as response:
                    assert response.status == 400
                    assert (await response.json())["error"]

    run(test())


def test_client_that_does_not_read_makes_no_heap_of_events_and_still_gets_all():
    async def test():
        async with serving(speed=2000.0, blocks=4000) as (fleet, _):
            server = fleet.servers[0]
            body = json.dumps(
                {"prompt": "x", "max_tokens": 30000, "ignore_eos": True, "stream": True}
            ).encode()
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            loop = asyncio.get_running_loop()
            host, port = server.url.removeprefix("http://").split(":")
            await loop.sock_connect(raw, (host, int(port)))
            head = f"POST /v1/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
            await loop.sock_sendall(raw, head.encode() + body)
            await until(lambda: server.state()["num_running"] == 1)
            await until(lambda: server.state()["num_running"] == 0, 20)
            received = bytearray()
            while piece := await loop.sock_recv(raw, 65536):
                received += piece
            raw.close()
        parts = [json.loads(x) for x in re.findall(rb"data: (\{.*\})", bytes(received))]
        text = "".join(p["choices"][0]["text"] for p in parts)
        assert text == expected("x", 30000)

    run(test())


@pytest.mark.parametrize("number", ["0", "-1", "9" * 400, "9" * 5000, "1e3", "nan", ""])
def test_wrong_lengths_in_the_header_are_refused(number):
    async def test():
        async with serving() as (fleet, session):
            headers = {"X-Output-Tokens": number}
            status, said = await ask(session, fleet.servers[0], headers=headers, prompt="x")
            assert status == 400
            assert "must be a number from 1 to 2147483647" in said["error"]["message"]

    run(test())


def test_taken_port_is_refused_in_one_sentence_and_nothing_stays_open():
    async def test():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match="choose another --host or --port"):
                async with serving(port=port):
                    raise AssertionError

    run(test())


@pytest.mark.parametrize("text", ["", "3:0", "x:0:hang", "3:0.5:hang", "3:0:slow", "3:0:hang=2"])
def test_wrong_fault_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="30:0:slow=10"):
        Fault.parse(text)


def test_fault_is_read_with_time_replica_kind_and_factor():
    assert Fault.parse("2.5:3:slow=10") == Fault(3, "slow", 10.0, 2.5)
    assert Fault.parse("0:0:recover") == Fault(0, "recover")
    with pytest.raises(ConfigError, match="did you mean hang"):
        Fault.parse("1:0:hung")
    with pytest.raises(ConfigError, match="above 0"):
        Fault.parse("1:0:slow=-1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"replicas": (0, 2)}, "replicas 0 to 1, got 2"),
        ({"speed": 0.0}, "speed must be above 0"),
        ({"faults": (Fault(1, "hang"),), "replicas": (0,)}, "replica 1 is not served here"),
    ],
)
def test_impossible_fleet_is_refused(settings, said):
    scenario = parse_scenario(SCENARIO.format(seqs=8, blocks=100), "test")
    with pytest.raises(ConfigError, match=said):
        Fleet(FleetConfig(scenario, **settings))


def test_a_fleet_that_is_to_retain_turns_is_refused():
    scenario = parse_scenario(SCENARIO.format(seqs=8, blocks=100), "test")
    engine = scenario.engine.model_copy(update={"retain_kv_s": 5.0, "prefix_caching": True})
    with pytest.raises(ConfigError, match="an emulated engine is not told which answers"):
        Fleet(FleetConfig(scenario.model_copy(update={"engine": engine})))


def test_a_fleet_with_batches_in_flight_is_refused():
    scenario = parse_scenario(SCENARIO.format(seqs=8, blocks=100), "test")
    entry = scenario.fleet[0].model_copy(update={"pipeline_parallel_size": 2})
    with pytest.raises(ConfigError, match="one batch in flight: set pipeline_parallel_size to 1"):
        Fleet(FleetConfig(scenario.model_copy(update={"fleet": (entry,)})))


def test_a_fleet_with_drafts_is_refused():
    scenario = parse_scenario(SCENARIO.format(seqs=8, blocks=100), "test")
    drafts = SpeculativeConfig(num_speculative_tokens=1, acceptance_rates=0.5)
    entry = scenario.fleet[0].model_copy(update={"speculative_config": drafts})
    with pytest.raises(ConfigError, match="one token at a time: leave speculative_config out"):
        Fleet(FleetConfig(scenario.model_copy(update={"fleet": (entry,)})))


def test_stamped_events_tell_when_the_request_came_and_when_they_were_sent():
    async def test():
        async with serving(stamped=True, speed=2.0) as (fleet, session):
            body = {"prompt": "x", "max_tokens": 20, "ignore_eos": True, "stream": True}
            before_s = time.monotonic()
            async with session.post(f"{fleet.servers[0].url}/v1/completions", json=body) as answer:
                page = await answer.read()
            after_s = time.monotonic()
        stamps = [tuple(map(float, x)) for x in re.findall(rb"\n: (\S+) (\S+)\n\n", page)]
        sent = [s for s, _ in stamps]
        assert len(stamps) > 1
        assert len({came for _, came in stamps}) == 1
        assert before_s - 1e-5 <= stamps[0][1] <= sent[0]
        assert sorted(sent) == sent
        assert sent[-1] <= after_s + 1e-5
        texts = re.findall(rb'"text":"([^"]*)"', page)
        assert b"".join(texts).decode() == expected("x", 20)

    run(test())
