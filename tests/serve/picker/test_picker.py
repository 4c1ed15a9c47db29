"""The endpoint picker, by a client that plays the gateway's part message by message."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servegym.errors import ConfigError
from servegym.serve.picker.app import Picker
from servegym.serve.picker.config import PickerConfig
from servegym.serve.picker.wire import METHOD, SERVICE

from ..running import RATES, run, until  # noqa: TID252 - tests are no package
from .gateway import (
    BUFFERED,
    DESTINATION,
    DUPLEX,
    NONE,
    STREAMED,
    body_of,
    destination,
    event,
    picking,
)

DONE = b"data: [DONE]\n\n"
#: Rejects whatever it may: nothing comes in a microsecond.
REJECTING = {
    "runtime": {"policy": "added-delay-reject:ttft=0.1"},
    "slo_classes": [{"name": "hasty", "ttft_s": 1e-6, "tpot_s": 1e-6}],
    "allow_reject": True,
}


def play(test, **settings):
    """Run a test's coroutine with a picker of its own."""

    async def with_picker():
        async with picking(**settings) as gateway:
            await test(gateway)

    run(with_picker, loop=asyncio.new_event_loop)


def test_a_stream_goes_out_and_its_tokens_come_back_into_the_books():
    async def test(gateway):
        stream = gateway.stream()
        await stream.request_headers(x_request_id="one")
        body = body_of("x" * 100_000, stream=True)
        await stream.body("request", body[:50_000], ends=False)
        await stream.body("request", body[50_000:], ends=True)
        to = destination(await stream.answer())
        pieces = [(await stream.answer()).request_body.response.body_mutation for _ in range(2)]
        sent = [piece.streamed_response for piece in pieces]
        assert b"".join(piece.body for piece in sent) == body  # as it came
        assert [piece.end_of_stream for piece in sent] == [False, True]
        chosen = gateway.endpoints.index(to)
        assert gateway.outstanding()[chosen] == 1
        row = gateway.state.replicas[:, chosen]
        assert row[3] == 25_000  # pending prefill: 100,000 bytes at four a token

        await stream.response_headers()
        assert (await stream.answer()).HasField("response_headers")
        assert row[3] == 25_000  # headers are no token
        for text in ("a", "b", "c"):
            await stream.body("response", event(text), ends=False)
            passed = (await stream.answer()).response_body.response.body_mutation
            assert passed.streamed_response.body == event(text)
        assert row[3] == 0
        assert gateway.state._generated[chosen] == 3
        assert gateway.picker.telemetry.latencies.total(lambda times: times.ttft).count == 1
        standing = gateway.picker._health.ejection.standings[chosen]
        assert (standing.streams, standing.owing) == (1, 0)  # slow clients are not its fault
        end = event("", "length") + DONE
        await stream.body("response", end, ends=True)
        last = (await stream.answer()).response_body.response.body_mutation.streamed_response
        assert (last.body, last.end_of_stream) == (end, True)
        await stream.done()
        assert await stream.answer() is None
        await until(gateway.idle)
        assert gateway.picker.telemetry.outcomes == {"finished": 1}

    play(test)


def test_an_answer_in_one_piece_is_booked_with_what_the_engine_reports():
    async def test(gateway):
        stream = gateway.stream()
        await stream.request_headers(accept_encoding="gzip")
        await stream.body("request", body_of(), ends=True)
        answer = await stream.answer()
        # packed, its tokens could not be counted
        mutation = answer.request_headers.response.header_mutation
        assert list(mutation.remove_headers) == ["accept-encoding", "x-prefiller-host-port"]
        await stream.answer()
        await stream.response_headers(stream=False)
        await stream.answer()
        usage = {"prompt_tokens": 7, "completion_tokens": 40}
        answer = json.dumps({"choices": [{"text": "x"}], "usage": usage}).encode()
        await stream.body("response", answer[:20], ends=False)
        await stream.answer()
        await stream.body("response", answer[20:], ends=True)
        await stream.answer()
        await until(lambda: sum(gateway.outstanding()) == 0)
        assert gateway.picker.telemetry.outcomes == {"finished": 1}
        # one answer of 40 tokens is all that is known of lengths
        assert gateway.picker.dispatcher.predictor.predict("default", 0) == 40

    play(test, dispatch={"prediction": {"min_answers": 1}})


def test_a_stream_that_nobody_asked_for_begins_once():
    async def test(gateway):
        stream = gateway.stream()
        await gateway.send_to(stream, body_of(stream=False))
        await stream.answer()
        await stream.response_headers(stream=True)
        for piece in (event("a"), event("b"), event("", "stop") + DONE):
            await stream.body("response", piece, ends=piece.endswith(DONE))
        assert all([await stream.answer() for _ in range(4)])
        await stream.done()
        await until(gateway.idle)
        assert gateway.picker.telemetry.latencies.total(lambda times: times.ttft).count == 1
        assert gateway.picker.telemetry.outcomes == {"finished": 1}

    play(test)


def test_requests_go_to_the_least_outstanding_replica_in_turn():
    async def test(gateway):
        places = [await gateway.send_to(gateway.stream(), body_of()) for _ in range(6)]
        assert gateway.outstanding() == [2, 2, 2]
        assert sorted(places[:3]) == sorted(gateway.endpoints)

    play(test, num_replicas=3)


def test_only_endpoints_of_the_subset_are_chosen():
    async def test(gateway):
        for _ in range(3):
            stream = gateway.stream()
            hint = {f"{DESTINATION}-subset": [gateway.endpoints[2], "10.9.9.9:1"]}
            metadata = {"envoy.lb.subset_hint": hint}
            to = await gateway.send_to(stream, body_of(), metadata=metadata)
            assert to == gateway.endpoints[2]
        assert gateway.outstanding() == [0, 0, 3]

    play(test, num_replicas=3, fallbacks=2)


@pytest.mark.parametrize("hint", [[], ["10.9.9.9:1"]], ids=["empty", "of others"])
def test_a_subset_without_a_replica_gets_503(hint):
    async def test(gateway):
        stream = gateway.stream()
        metadata = {"envoy.lb.subset_hint": {f"{DESTINATION}-subset": hint}}
        await stream.request_headers(metadata=metadata)
        await stream.body("request", body_of(), ends=True)
        refused = (await stream.answer()).immediate_response
        assert refused.status.code == 503
        assert json.loads(refused.body)["error"]["code"] == "no_replica"
        assert await stream.answer() is None
        await until(gateway.idle)

    # one that is named and not there may come; in an empty list there is nothing to wait for
    play(test, request={"max_hold_s": 10.0 if not hint else 0.0})


def test_a_rejected_request_gets_429_and_when_to_come_again():
    async def test(gateway):
        stream = gateway.stream()
        await stream.request_headers()
        await stream.body("request", body_of(), ends=True)
        refused = (await stream.answer()).immediate_response
        assert refused.status.code == 429
        assert refused.details == "overloaded"
        headers = {o.header.key.lower(): o.header.raw_value for o in refused.headers.set_headers}
        assert headers["retry-after"] == b"1"
        await until(gateway.idle)
        assert gateway.picker.telemetry.outcomes == {"rejected": 1}

    play(test, dispatch=REJECTING)


def test_a_held_request_waits_and_is_left_by_a_gateway_that_gives_up():
    async def test(gateway):
        # a policy that holds whenever it may: nobody is up to two requests
        runtime = gateway.picker.dispatcher.runtime
        hold = len(gateway.replicas)
        runtime.loaded.policy.act = lambda seen, envs: [hold] if seen.mask[0, hold] else [0]
        patient, hasty = gateway.stream(), gateway.stream()
        for stream in (patient, hasty):
            await stream.request_headers()
            await stream.body("request", body_of(), ends=True)
        await until(lambda: gateway.state.num_held == 2)
        hasty.cancel()
        await until(lambda: gateway.state.num_held == 1)
        assert destination(await patient.answer()) in gateway.endpoints  # after max_hold_s
        assert gateway.picker.telemetry.outcomes == {"cancelled": 1}

    dispatch = {"runtime": {"policy": "added-delay", "timeout_s": 1.0}, "allow_hold": True}
    play(test, dispatch=dispatch, request={"hold_s": 0.02, "max_hold_s": 0.4})


@pytest.mark.parametrize(
    ("body", "fields", "status", "code"),
    [
        (b"{", {}, 400, "invalid_json"),
        (b'{"prompt": 3}', {}, 400, "invalid_request"),
        (body_of("x" * 2000), {}, 413, "body_too_large"),
        (body_of(), {"x_slo_class": "fast"}, 400, "unknown_slo_class"),
    ],
)
def test_a_request_that_cannot_be_read_is_answered_at_once(body, fields, status, code):
    async def test(gateway):
        stream = gateway.stream()
        await stream.request_headers(**fields)
        await stream.body("request", body, ends=True)
        refused = (await stream.answer()).immediate_response
        assert (refused.status.code, json.loads(refused.body)["error"]["code"]) == (status, code)
        await until(gateway.idle)

    play(test, request={"max_body_bytes": 1000})


def test_a_model_that_nobody_has_is_refused_in_the_form_of_its_endpoint():
    async def test(gateway):
        said = {}
        for path in ("/v1/completions", "/v1/messages"):
            stream = gateway.stream()
            await stream.request_headers(path)
            messages = [{"role": "user", "content": "hi"}]
            body = {"model": "other", "prompt": "hi", "messages": messages, "max_tokens": 3}
            await stream.body("request", json.dumps(body).encode(), ends=True)
            refused = (await stream.answer()).immediate_response
            assert refused.status.code == 404
            said[path] = json.loads(refused.body)["error"]
        assert said["/v1/completions"]["code"] == "model_not_found"
        assert said["/v1/messages"]["type"] == "not_found_error"
        await until(gateway.idle)

    play(test)


def test_an_unseen_body_may_ask_for_any_of_several_models():
    async def test(gateway):
        gateway.replicas[0].adapters = ["n"]
        await until(lambda: set(gateway.picker._health.models()) == {"m", "n"})
        stream = gateway.stream(NONE, DUPLEX)
        await stream.request_headers(content_length="40")
        assert destination(await stream.answer()) in gateway.endpoints
        to = await gateway.send_to(gateway.stream(), body_of().replace(b'"m"', b'"n"'))
        assert to == gateway.endpoints[0]

    play(test, health={"models_interval_s": 0.05})


def test_fallbacks_are_the_replicas_with_the_fewest_requests():
    async def test(gateway):
        for r, num in enumerate((0, 3, 1, 2)):
            gateway.state.replicas[1, r] = num
        to = await gateway.send_to(gateway.stream(), body_of())
        first, second, third, _ = (gateway.endpoints[r] for r in (0, 2, 3, 1))
        assert to == f"{first},{second},{third}"

    play(test, num_replicas=4, fallbacks=2)


def test_the_books_follow_the_endpoint_that_served_and_blame_the_first():
    async def test(gateway):
        stream = gateway.stream()
        first, second = (await gateway.send_to(stream, body_of(stream=True))).split(",")
        await stream.answer()
        there, other = gateway.endpoints.index(first), gateway.endpoints.index(second)
        await stream.response_headers(served=second)
        await stream.answer()
        assert (gateway.outstanding()[there], gateway.outstanding()[other]) == (0, 1)
        await stream.body("response", event("a"), ends=False)
        await stream.answer()
        standings = gateway.picker._health.ejection.standings
        assert (standings[there].num_failed, standings[other].num_failed) == (1, 0)
        await stream.body("response", event("", "stop") + DONE, ends=True)
        await stream.answer()
        await until(lambda: sum(gateway.outstanding()) == 0)
        assert gateway.picker.telemetry.outcomes == {"finished": 1}

    play(test, fallbacks=1)


def test_a_gateway_that_leaves_in_the_middle_of_an_answer_has_cancelled_it():
    async def test(gateway):
        for leave in ("cancel", "done"):
            stream = gateway.stream()
            await gateway.send_to(stream, body_of(stream=True))
            await stream.answer()
            await stream.response_headers()
            await stream.body("response", event("a"), ends=False)
            assert [await stream.answer() for _ in range(2)]
            if leave == "cancel":
                stream.cancel()
            else:
                await stream.done()
            await until(gateway.idle)
        assert gateway.picker.telemetry.outcomes == {"cancelled": 2}
        assert gateway.picker._desk.limits._accounts == {}  # tenants' names are clients' own

    play(test)


@pytest.mark.parametrize(
    ("status", "fields", "pieces", "outcome"),
    [
        (200, {}, [event("a")], "failed"),  # the stream has ended before it was whole
        (200, {}, [b'data: {"error": {"message": "no memory"}}\n\n'], "failed"),
        (500, {"stream": False}, [b'{"error": {}}'], "refused"),
    ],
    ids=["cut", "error", "status"],
)
def test_answers_that_are_none_are_no_ends(status, fields, pieces, outcome):
    async def test(gateway):
        stream = gateway.stream()
        await gateway.send_to(stream, body_of(stream=True))
        await stream.answer()
        await stream.response_headers(status, **fields)
        for piece in pieces:
            await stream.body("response", piece, ends=False)
        await stream.trailers("response")
        answers = [await stream.answer() for _ in range(len(pieces) + 2)]
        assert answers[-1].HasField("response_trailers")
        await until(lambda: sum(gateway.outstanding()) == 0)
        assert gateway.picker.telemetry.outcomes == {outcome: 1}

    play(test)


def test_a_replica_that_is_full_is_passed_over_as_long_as_it_says():
    async def test(gateway):
        stream = gateway.stream()
        to = await gateway.send_to(stream, body_of(stream=True))
        await stream.answer()
        await stream.response_headers(429, stream=False, retry_after="5")
        await stream.body("response", b"{}", ends=True)
        await stream.answer()
        await until(lambda: sum(gateway.outstanding()) == 0)
        others = [await gateway.send_to(gateway.stream(), body_of()) for _ in range(3)]
        assert to not in others

    play(test)


def test_a_buffered_body_gets_its_headers_with_the_destination():
    async def test(gateway):
        stream = gateway.stream(BUFFERED, STREAMED)
        await stream.request_headers()
        first = await stream.answer()
        assert first.HasField("request_headers")
        assert not first.request_headers.response.HasField("header_mutation")
        await stream.body("request", body_of(stream=True), ends=True)
        answer = await stream.answer()
        assert destination(answer, "request_body") in gateway.endpoints
        assert not answer.request_body.response.HasField("body_mutation")
        await stream.response_headers()
        await stream.body("response", event("a", "stop") + DONE, ends=True)
        assert (await stream.answer()).HasField("response_headers")
        passed = await stream.answer()
        assert not passed.response_body.response.HasField("body_mutation")
        await until(lambda: sum(gateway.outstanding()) == 0)
        assert gateway.picker.telemetry.outcomes == {"finished": 1}

    play(test)


@pytest.mark.parametrize("mode", [NONE, STREAMED])
def test_without_its_body_a_request_is_as_long_as_its_headers_say(mode):
    async def test(gateway):
        stream = gateway.stream(mode, DUPLEX)
        await stream.request_headers(content_length="4000")
        to = destination(await stream.answer())
        row = gateway.state.replicas[:, gateway.endpoints.index(to)]
        assert row[2] == 1000  # outstanding prompt tokens, four bytes each
        if mode == STREAMED:
            await stream.body("request", b"x" * 4000, ends=True)
            assert (await stream.answer()).HasField("request_body")

    play(test)


def test_trailers_end_a_body_and_pass_behind_it():
    async def test(gateway):
        stream = gateway.stream()
        await stream.request_headers()
        await stream.body("request", body_of(), ends=False)
        await stream.trailers("request")
        destination(await stream.answer())
        piece = (await stream.answer()).request_body.response.body_mutation.streamed_response
        assert (piece.body, piece.end_of_stream) == (body_of(), False)
        assert (await stream.answer()).HasField("request_trailers")

    play(test)


def test_what_is_no_inference_goes_round_and_is_not_booked():
    async def test(gateway):
        places = []
        for _ in range(4):
            stream = gateway.stream()
            await stream.request_headers("/v1/models?x=1", ends=True)
            places.append(destination(await stream.answer()))
        assert sorted(places) == sorted(2 * gateway.endpoints)
        assert gateway.outstanding() == [0, 0]
        file = gateway.stream()
        await file.request_headers("/v1/files")
        await file.body("request", b"any bytes", ends=True)
        assert destination(await file.answer()) in gateway.endpoints
        assert gateway.outstanding() == [0, 0]
        embedding = gateway.stream()
        await embedding.request_headers("/v1/embeddings")
        await embedding.body("request", b'{"input": "x"}', ends=True)
        assert destination(await embedding.answer()) in gateway.endpoints
        assert sum(gateway.outstanding()) == 1

    play(test)


def test_a_gateway_that_only_observes_gets_no_answer():
    async def test(gateway):
        call = gateway.channel.stream_stream(f"/{SERVICE}/{METHOD}")()
        await call.write(bytes.fromhex("12005001"))  # request headers, observability mode
        assert await call.read() is grpc.aio.EOF
        assert sum(gateway.outstanding()) == 0

    play(test)


def test_what_is_no_message_ends_the_stream_with_an_error():
    async def test(gateway):
        call = gateway.channel.stream_stream(f"/{SERVICE}/{METHOD}")()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        await until(gateway.idle)

    play(test)


def test_engines_counts_end_requests_whose_answers_are_not_sent():
    async def test(gateway):
        streams = [gateway.stream(DUPLEX, NONE) for _ in range(4)]
        for replica in gateway.replicas:
            replica.running = 2
        for stream in streams:
            await gateway.send_to(stream, body_of(stream=True))
            await stream.done()
        await until(lambda: gateway.picker.telemetry.in_flight == 0)
        await asyncio.sleep(0.2)
        assert gateway.outstanding() == [2, 2]  # the streams have ended, not the requests
        gateway.replicas[0].running = 1
        await until(lambda: gateway.outstanding() == [1, 2])
        gateway.replicas[0].running = gateway.replicas[1].running = 0
        await until(gateway.idle)
        assert gateway.picker.ends.num_counted == 4

    ends = {"look_s": 0.02, "settle_s": 0.05}
    play(test, response="none", ends=ends, metrics={"interval_s": 0.02})


def test_headers_alone_end_what_is_no_stream_and_nothing_else():
    async def test(gateway):
        gateway.replicas[0].running = gateway.replicas[1].running = 1
        whole, stream, gone = (gateway.stream(DUPLEX, NONE) for _ in range(3))
        for each in (whole, stream, gone):
            await gateway.send_to(each, body_of())
            await each.answer()
        await whole.response_headers(stream=False)
        await whole.answer()
        await until(lambda: sum(gateway.outstanding()) == 2)
        await stream.response_headers()
        await stream.answer()
        for each in (whole, stream, gone):
            await each.done()
        await until(lambda: gateway.picker.telemetry.in_flight == 0)
        assert sum(gateway.outstanding()) == 1  # the stream; the client of the other has left
        assert gateway.picker.telemetry.outcomes == {"finished": 1, "cancelled": 1}

    play(test, response="headers")


def test_a_gateway_that_sends_less_than_the_file_says_is_told_once(caplog):
    async def test(gateway):
        for _ in range(2):
            stream = gateway.stream(DUPLEX, NONE)
            await gateway.send_to(stream, body_of())
            await stream.done()
        await until(gateway.idle)

    play(test)
    said = [record.message for record in caplog.records if "response_body_mode" in record.message]
    assert len(said) == 1
    assert "response: bodies" in said[0]


@pytest.mark.parametrize(
    ("policy", "reads"),
    [
        ("mct", "generated_tokens"),
        ("added-delay-inferred", "step_time_ratio"),
        ("linucb", "became"),
    ],
)
def test_a_policy_that_goes_by_tokens_is_refused_where_none_are_seen(policy, reads):
    replica = {"name": "r0", "url": "http://127.0.0.1:8000", "rates": RATES}
    dispatch = {"runtime": {"policy": policy}}
    config = {"replicas": [replica], "response": "none", "dispatch": dispatch}
    with pytest.raises(ConfigError, match=rf"{policy} goes by .*{reads}.*response: none"):
        Picker(PickerConfig.model_validate(config))
    # nor does it step in for another
    config["dispatch"] = {"runtime": {"policy": "round-robin", "fallback": policy}}
    with pytest.raises(ConfigError, match=f"{policy} goes by"):
        Picker(PickerConfig.model_validate(config))


def test_the_rule_decides_where_the_policy_is_not_required(caplog):
    async def test(gateway):
        assert gateway.picker.dispatcher.runtime.loaded is None
        await gateway.send_to(gateway.stream(DUPLEX, NONE), body_of())
        runtime = gateway.picker.dispatcher.runtime
        assert runtime.counters.num_fallback == 1
        # nor is it put in place later
        with pytest.raises(ConfigError, match="mct goes by"):
            runtime.reload("mct")

    runtime = {"policy": "mct", "require_policy": False}
    play(test, response="none", dispatch={"runtime": runtime})
    assert "least-outstanding decides" in caplog.text


def test_health_is_asked_by_the_names_of_the_protocol():
    async def test(gateway):
        stub = health_pb2_grpc.HealthStub(gateway.channel)

        async def status(name):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

        names = ("", "liveness", "readiness", SERVICE)
        assert [await status(name) for name in names] == ["SERVING"] * 4
        await gateway.picker.drain()
        assert [await status(name) for name in names[1:]] == [
            "SERVING",
            "NOT_SERVING",
            "NOT_SERVING",
        ]

    play(test)


def test_operators_have_the_router_s_endpoints():
    async def test(gateway):
        await gateway.send_to(gateway.stream(), body_of())
        url = f"http://127.0.0.1:{gateway.picker.admin_port}"
        async with aiohttp.ClientSession() as client:
            async with client.get(f"{url}/metrics") as response:
                page = await response.text()
            async with client.post(f"{url}/drain", json={"replica": "r0"}) as response:
                assert response.status == 200
        assert 'servegym_decisions_total{by="policy"} 1' in page
        assert 'servegym_picker_assumed_ends_total{by="count"} 0' in page
        places = {await gateway.send_to(gateway.stream(), body_of()) for _ in range(3)}
        assert places == {gateway.endpoints[1]}

    play(test)


def test_a_port_that_is_taken_is_one_clear_error():
    async def test(gateway):
        listen = gateway.picker.config.listen.model_copy(update={"port": gateway.picker.port})
        other = Picker(gateway.picker.config.model_copy(update={"listen": listen}))
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{listen.port}: is the"):
            await other.start()

    play(test)


@pytest.mark.parametrize(
    ("certificate", "words"),
    [("none.pem", "none.pem cannot be read"), ("text.pem", "text.pem and .*text.pem no pair")],
)
def test_a_certificate_that_is_none_is_one_clear_error(tmp_path, certificate, words):
    (tmp_path / "text.pem").write_text("no certificate")
    files = {"certificate": tmp_path / certificate, "key": tmp_path / "text.pem"}
    replica = {"name": "r0", "url": "http://127.0.0.1:9", "rates": RATES}
    config = {"replicas": [replica], "listen": {"port": 0, "admin_port": 0, **files}}

    async def start():
        picker = Picker(PickerConfig.model_validate(config))
        with pytest.raises(ConfigError, match=words):
            await picker.start()

    run(start, loop=asyncio.new_event_loop)
