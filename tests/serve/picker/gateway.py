"""A gateway's part of the conversation, message by message, and a picker for the time of a test."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence

import grpc

from servegym.serve.picker.app import Picker
from servegym.serve.picker.config import PickerConfig
from servegym.serve.picker.wire import _CLASSES, METHOD, SERVICE

from ..running import RATES  # noqa: TID252 - tests are no package
from ..upstream import Upstream  # noqa: TID252

CHAT = "/v1/chat/completions"
DESTINATION = "x-gateway-destination-endpoint"
#: Of a body, by `ProcessingMode.BodySendMode`.
NONE, STREAMED, BUFFERED, DUPLEX = 0, 1, 2, 4


def body_of(prompt: str = "hello", **more) -> bytes:
    return json.dumps({"model": "m", "prompt": prompt, **more}).encode()


def event(text: str, finish: str | None = None) -> bytes:
    """An event of a stream, as vLLM writes it."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    text = json.dumps({"id": "x", "object": "text_completion", "choices": [choice]})
    return f"data: {text}\n\n".encode()


class Stream:
    """One request, as the gateway sees it."""

    def __init__(self, call, modes: tuple[int, int]) -> None:
        self._call = call
        self._modes: tuple[int, int] | None = modes

    async def send(self, kind: str, part, *, metadata: Mapping | None = None) -> None:
        message = _CLASSES["ProcessingRequest"]()
        getattr(message, kind).CopyFrom(part)
        if self._modes is not None:  # the first message says it
            config = message.protocol_config
            config.SetInParent()
            config.request_body_mode, config.response_body_mode = self._modes
            self._modes = None
        for name, values in (metadata or {}).items():
            message.metadata_context.filter_metadata[name].update(values)
        await self._call.write(message.SerializeToString())

    async def headers(self, kind: str, fields: Mapping[str, str], *, ends=False, metadata=None):
        part = _CLASSES["HttpHeaders"](end_of_stream=ends)
        for key, value in fields.items():
            part.headers.headers.add(key=key, raw_value=value.encode())
        await self.send(f"{kind}_headers", part, metadata=metadata)

    async def request_headers(self, path="/v1/completions", *, ends=False, metadata=None, **fields):
        named = {key.replace("_", "-"): value for key, value in fields.items()}
        fields = {":method": "POST", ":path": path, "content-type": "application/json", **named}
        await self.headers("request", fields, ends=ends, metadata=metadata)

    async def response_headers(self, status=200, *, stream=True, ends=False, served=None, **fields):
        kind = "text/event-stream; charset=utf-8" if stream else "application/json"
        named = {key.replace("_", "-"): value for key, value in fields.items()}
        metadata = {"envoy.lb": {f"{DESTINATION}-served": served}} if served else None
        fields = {":status": str(status), "content-type": kind, **named}
        await self.headers("response", fields, ends=ends, metadata=metadata)

    async def body(self, kind: str, data: bytes, *, ends: bool) -> None:
        await self.send(f"{kind}_body", _CLASSES["HttpBody"](body=data, end_of_stream=ends))

    async def trailers(self, kind: str) -> None:
        await self.send(f"{kind}_trailers", _CLASSES["HttpTrailers"]())

    async def answer(self):
        """The picker's next message, `None` if it has closed the stream."""
        data = await self._call.read()
        return None if data is grpc.aio.EOF else _CLASSES["ProcessingResponse"].FromString(data)

    async def done(self) -> None:
        await self._call.done_writing()

    def cancel(self) -> None:
        self._call.cancel()


class Gateway:
    """What a test needs: the picker, its replicas and a channel to it."""

    def __init__(self, picker: Picker, replicas: Sequence[Upstream], channel) -> None:
        self.picker, self.replicas, self.channel = picker, replicas, channel
        self.state = picker.dispatcher.state
        self.endpoints = [f"127.0.0.1:{replica.port}" for replica in replicas]
        self._open = channel.stream_stream(f"/{SERVICE}/{METHOD}")

    def stream(self, request: int = DUPLEX, response: int = DUPLEX) -> Stream:
        return Stream(self._open(), (request, response))

    async def send_to(self, stream: Stream, body: bytes, **headers) -> str:
        """Play a request until it has its destination; return that."""
        await stream.request_headers(**headers)
        await stream.body("request", body, ends=True)
        return destination(await stream.answer())

    def outstanding(self) -> list[int]:
        return [self.state.outstanding(r) for r in range(len(self.replicas))]

    def idle(self) -> bool:
        """Whether nothing is left in any book."""
        standings = self.picker._health.ejection.standings
        return (
            self.picker.telemetry.in_flight == 0
            and self.state.num_held == 0
            and sum(self.outstanding()) == 0
            and all(self.state.replicas[3] == 0)
            and not any(s.streams or s.wholes or s.owing for s in standings.values())
        )


def destination(answer, part: str = "request_headers") -> str:
    """Where a request goes; the header and the metadata must say the same."""
    common = getattr(answer, part).response
    (option,) = common.header_mutation.set_headers
    assert option.header.key == DESTINATION
    assert option.append_action == 2  # what the client has sent under that name is overwritten
    assert common.clear_route_cache
    said = option.header.raw_value.decode()
    assert dict(answer.dynamic_metadata["envoy.lb"]) == {DESTINATION: said}
    return said


@contextlib.asynccontextmanager
async def picking(
    num_replicas: int = 2, roles: Sequence[str] = (), **settings
) -> AsyncIterator[Gateway]:
    """Start engines, a picker and a channel to it; stop all of them."""
    replicas = [Upstream() for _ in roles or range(num_replicas)]
    for replica in replicas:
        await replica.start()
    data = {
        "replicas": [
            {"name": f"r{i}", "url": replica.url, "rates": RATES}
            | ({"role": roles[i]} if roles else {})
            for i, replica in enumerate(replicas)
        ],
        "listen": {"port": 0, "admin_port": 0},
        "dispatch": {"runtime": {"policy": "least-outstanding"}},
        "health": {"interval_s": 0.05},
        "drain_s": 5.0,
    }
    for key, value in settings.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    picker = Picker(PickerConfig.model_validate(data))
    await picker.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{picker.port}") as channel:
        try:
            yield Gateway(picker, replicas, channel)
        finally:
            await picker.stop()
            for replica in replicas:
                await replica.stop()
