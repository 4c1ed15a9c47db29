"""Messages on the wire: bytes that Envoy's own definitions have made, and make of ours.

The hexadecimal texts were written with the generated code of xds-protos 1.85.0, which comes from
Envoy's definitions and shares nothing with the descriptions under test.
"""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError

from servegym.serve.picker.wire import (
    MAX_PIECE_BYTES,
    Body,
    BodyMode,
    Destination,
    Direction,
    Headers,
    Message,
    Trailers,
    pass_body,
    pass_headers,
    pass_trailers,
    read,
    refuse,
    stream_body,
)

REQUEST, RESPONSE = Direction.REQUEST, Direction.RESPONSE
#: Request headers, both modes of bodies, a subset of endpoints, and an attribute, which is skipped.
HEADERS = (
    "12310a2f0a180a053a706174681a0f2f76312f636f6d706c6574696f6e730a130a0c782d726571756573742d69641a"
    "036f6e6542690a670a14656e766f792e6c622e7375627365745f68696e74124f0a4d0a25782d676174657761792d64"
    "657374696e6174696f6e2d656e64706f696e742d737562736574122432220a0f1a0d31302e302e302e313a38303030"
    "0a0f1a0d31302e302e302e323a383030304a150a016112100a0e0a0162120911000000000000f03f5a0408041002"
)
SERVED = (
    "1a140a100a0e0a073a7374617475731a03323030180142480a460a08656e766f792e6c62123a0a380a25782d676174"
    "657761792d64657374696e6174696f6e2d656e64706f696e742d736572766564120f1a0d31302e302e302e323a3830"
    "3030"
)
DESTINATION = (
    "0a5a0a5812540a410a3d0a1e782d676174657761792d64657374696e6174696f6e2d656e64706f696e741a1b31302e"
    "302e302e313a383030302c31302e302e302e323a383030301802120f6163636570742d656e636f64696e6728014251"
    "0a4f0a08656e766f792e6c6212432a410a3f0a1e782d676174657761792d64657374696e6174696f6e2d656e64706f"
    "696e74121d1a1b31302e302e302e313a383030302c31302e302e302e323a38303030"
)
REFUSAL = (
    "3a2d0a0308ad0312160a140a100a0b72657472792d61667465721a013118021a026e6f2a0a6f7665726c6f61646564"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEADERS,
            Message(
                Headers(REQUEST, {":path": "/v1/completions", "x-request-id": "one"}, False),
                subset=("10.0.0.1:8000", "10.0.0.2:8000"),
                modes=(BodyMode.FULL_DUPLEX_STREAMED, BodyMode.BUFFERED),
            ),
        ),
        ("22060a027b7d1001", Message(Body(REQUEST, b"{}", True))),
        (SERVED, Message(Headers(RESPONSE, {":status": "200"}, True), served="10.0.0.2:8000")),
        (
            "3a140a120a100a0b677270632d7374617475731a01305001",
            Message(Trailers(RESPONSE), observes=True),
        ),
        ("", Message(None)),
        ("5a0408071007", Message(None, modes=(BodyMode.STREAMED, BodyMode.STREAMED))),
    ],
    ids=["headers", "body", "served", "trailers", "nothing", "modes of the future"],
)
def test_what_envoy_writes_is_read(text, message):
    assert read(bytes.fromhex(text)) == message


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            pass_headers(
                REQUEST, Destination(["10.0.0.1:8000", "10.0.0.2:8000"], ["accept-encoding"])
            ),
            DESTINATION,
        ),
        (pass_headers(RESPONSE), "12020a00"),
        (pass_body(RESPONSE), "22020a00"),
        (pass_trailers(RESPONSE), "3200"),
        (next(stream_body(REQUEST, b"{}", ends=True)), "1a0c0a0a1a081a060a027b7d1001"),
        (refuse(429, [("retry-after", "1")], b"no", "overloaded"), REFUSAL),
    ],
    ids=["destination", "headers", "body", "trailers", "streamed", "refusal"],
)
def test_what_is_answered_is_what_envoy_would_write(answer, text):
    assert answer.hex() == text


def test_a_streamed_body_goes_in_pieces_and_the_last_says_so():
    body = bytes(range(256)) * 500  # 128,000 bytes: two whole pieces and 8,000
    pieces = [read_piece(data) for data in stream_body(REQUEST, body, ends=True)]
    assert [len(data) for data, _ in pieces] == [MAX_PIECE_BYTES, MAX_PIECE_BYTES, 8_000]
    assert b"".join(data for data, _ in pieces) == body
    assert [ends for _, ends in pieces] == [False, False, True]
    assert [read_piece(data) for data in stream_body(REQUEST, b"", ends=True)] == [(b"", True)]
    assert [read_piece(data) for data in stream_body(REQUEST, b"x", ends=False)] == [(b"x", False)]


def read_piece(data: bytes) -> tuple[bytes, bool]:
    from servegym.serve.picker.wire import _CLASSES

    answer = _CLASSES["ProcessingResponse"].FromString(data)
    part = answer.request_body.response.body_mutation.streamed_response
    return part.body, part.end_of_stream


def test_a_subset_may_be_one_text_with_commas():
    from servegym.serve.picker.wire import _CLASSES

    message = _CLASSES["ProcessingRequest"]()
    hint = {"x-gateway-destination-endpoint-subset": " 10.0.0.1:8000, 10.0.0.2:8000,"}
    message.metadata_context.filter_metadata["envoy.lb.subset_hint"].update(hint)
    assert read(message.SerializeToString()).subset == ("10.0.0.1:8000", "10.0.0.2:8000")
    hint = {"x-gateway-destination-endpoint-subset": []}
    message.metadata_context.filter_metadata["envoy.lb.subset_hint"].update(hint)
    assert read(message.SerializeToString()).subset == ()  # said, and empty: nobody may be chosen


def test_what_is_no_message_is_refused():
    with pytest.raises(DecodeError):
        read(b"\xff\xff\xff")
