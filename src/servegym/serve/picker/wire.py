"""What a gateway and an endpoint picker say to each other, on the wire and in Python.

The messages are those of Envoy's external processing (`envoy.service.ext_proc.v3`), as far as an
endpoint picker needs them: a field that is not described here is skipped when it is read. What is
put into them, and where, is the endpoint picker protocol of the Gateway API inference extension
(its proposal 004).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

from servegym.serve.router.headers import PREFILLER_HEADER

#: Name of the service, which gateways call and whose health they ask.
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD = "Process"
#: Header and key of metadata that name the endpoints chosen, and the name space of the latter.
DESTINATION = "x-gateway-destination-endpoint"
LB_NAMESPACE = "envoy.lb"
#: Key of metadata that names the endpoint that has answered, in the same name space.
SERVED = "x-gateway-destination-endpoint-served"
#: Where the gateway says among which endpoints to choose.
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET = "x-gateway-destination-endpoint-subset"
#: A body that is streamed back goes in pieces of at most so much: 64 kB is what Envoy recommends.
MAX_PIECE_BYTES = 60_000
#: `HeaderValueOption.append_action`: what a client has sent under that name goes.
_OVERWRITE = 2

_PACKAGE = "servegym.picker"
_STRUCT = ".google.protobuf.Struct"
_KINDS = {"bool": 8, "string": 9, "message": 11, "bytes": 12, "enum": 5}
_Fields = Sequence[tuple[str, int, str]]
#: Fields of each message: name, number and type; `*` stands for a repeated one, `{}` for a map.
#: Numbers and types are Envoy's; an enumeration is read as the number that it is on the wire.
_MESSAGES: Mapping[str, _Fields] = {
    "HeaderValue": (("key", 1, "string"), ("value", 2, "string"), ("raw_value", 3, "bytes")),
    "HeaderMap": (("headers", 1, "*HeaderValue"),),
    "HeaderValueOption": (("header", 1, "HeaderValue"), ("append_action", 3, "enum")),
    "HeaderMutation": (
        ("set_headers", 1, "*HeaderValueOption"),
        ("remove_headers", 2, "*string"),
    ),
    "Metadata": (("filter_metadata", 1, "{}"),),
    "HttpHeaders": (("headers", 1, "HeaderMap"), ("end_of_stream", 3, "bool")),
    "HttpBody": (("body", 1, "bytes"), ("end_of_stream", 2, "bool")),
    "HttpTrailers": (("trailers", 1, "HeaderMap"),),
    "ProtocolConfiguration": (("request_body_mode", 1, "enum"), ("response_body_mode", 2, "enum")),
    "ProcessingRequest": (
        ("request_headers", 2, "HttpHeaders"),
        ("response_headers", 3, "HttpHeaders"),
        ("request_body", 4, "HttpBody"),
        ("response_body", 5, "HttpBody"),
        ("request_trailers", 6, "HttpTrailers"),
        ("response_trailers", 7, "HttpTrailers"),
        ("metadata_context", 8, "Metadata"),
        ("observability_mode", 10, "bool"),
        ("protocol_config", 11, "ProtocolConfiguration"),
    ),
    "StreamedBodyResponse": (("body", 1, "bytes"), ("end_of_stream", 2, "bool")),
    "BodyMutation": (("streamed_response", 3, "StreamedBodyResponse"),),
    "CommonResponse": (
        ("header_mutation", 2, "HeaderMutation"),
        ("body_mutation", 3, "BodyMutation"),
        ("clear_route_cache", 5, "bool"),
    ),
    "HeadersResponse": (("response", 1, "CommonResponse"),),
    "BodyResponse": (("response", 1, "CommonResponse"),),
    "TrailersResponse": (("header_mutation", 1, "HeaderMutation"),),
    "HttpStatus": (("code", 1, "enum"),),
    "ImmediateResponse": (
        ("status", 1, "HttpStatus"),
        ("headers", 2, "HeaderMutation"),
        ("body", 3, "bytes"),
        ("details", 5, "string"),
    ),
    "ProcessingResponse": (
        ("request_headers", 1, "HeadersResponse"),
        ("response_headers", 2, "HeadersResponse"),
        ("request_body", 3, "BodyResponse"),
        ("response_body", 4, "BodyResponse"),
        ("request_trailers", 5, "TrailersResponse"),
        ("response_trailers", 6, "TrailersResponse"),
        ("immediate_response", 7, "ImmediateResponse"),
        ("dynamic_metadata", 8, _STRUCT),
    ),
}


def _describe(name: str, fields: _Fields) -> descriptor_pb2.DescriptorProto:
    message = descriptor_pb2.DescriptorProto(name=name)
    for field, number, kind in fields:
        made = message.field.add(name=field, number=number, label=1)
        if kind == "{}":
            entry = message.nested_type.add(name="FilterMetadataEntry")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, label=1, type=_KINDS["string"])
            entry.field.add(
                name="value", number=2, label=1, type=_KINDS["message"], type_name=_STRUCT
            )
            made.label, made.type = 3, _KINDS["message"]
            made.type_name = f".{_PACKAGE}.{name}.{entry.name}"
            continue
        if kind.startswith("*"):
            made.label, kind = 3, kind[1:]
        if kind in _KINDS:
            made.type = _KINDS[kind]
        else:
            made.type = _KINDS["message"]
            made.type_name = kind if kind.startswith(".") else f".{_PACKAGE}.{kind}"
    return message


def _compile() -> Mapping[str, Any]:
    """Make the classes of all messages.

    They have names of their own: those of Envoy may be loaded beside them.
    """
    pool = descriptor_pool.Default()
    file = descriptor_pb2.FileDescriptorProto(
        name="servegym/picker/ext_proc.proto", package=_PACKAGE, syntax="proto3"
    )
    file.dependency.append(struct_pb2.DESCRIPTOR.name)
    file.message_type.extend(_describe(name, fields) for name, fields in _MESSAGES.items())
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


_CLASSES = _compile()


class Direction(Enum):
    """Whose message it is that passes the gateway; the value is how its fields begin."""

    REQUEST = "request"
    RESPONSE = "response"


class BodyMode(IntEnum):
    """How the gateway sends a body, `ProcessingMode.BodySendMode`."""

    NONE = 0
    STREAMED = 1
    BUFFERED = 2
    BUFFERED_PARTIAL = 3
    FULL_DUPLEX_STREAMED = 4
    GRPC = 5


_MODES = {mode.value: mode for mode in BodyMode}


class Headers(NamedTuple):
    """Headers have come.

    Attributes:
        direction: Whose.
        fields: By name, in lower case; of a repeated one the last.
        ends: Whether there is no body.
    """

    direction: Direction
    fields: Mapping[str, str]
    ends: bool


class Body(NamedTuple):
    """A piece of a body has come, or all of it.

    Attributes:
        direction: Whose.
        data: The piece.
        ends: Whether it is the last, and no trailers come.
    """

    direction: Direction
    data: bytes
    ends: bool


class Trailers(NamedTuple):
    """Trailers have come; they end a body.

    Attributes:
        direction: Whose.
    """

    direction: Direction


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a gateway.

    Attributes:
        part: What has come; `None` if it is none that is known.
        subset: Endpoints among which to choose; `None`: the gateway does not say.
        served: The endpoint that has answered, if the gateway says so.
        modes: How bodies of requests and of responses come; only the first message says it.
        observes: Whether answers to it are not wanted.
    """

    part: Headers | Body | Trailers | None
    subset: tuple[str, ...] | None = None
    served: str | None = None
    modes: tuple[BodyMode, BodyMode] | None = None
    observes: bool = False


def read(data: bytes) -> Message:
    """Read a `ProcessingRequest`.

    Raises:
        google.protobuf.message.DecodeError: If it is none.
    """
    message = _CLASSES["ProcessingRequest"].FromString(data)
    metadata = message.metadata_context.filter_metadata
    subset = served = modes = None
    if SUBSET_NAMESPACE in metadata and SUBSET in metadata[SUBSET_NAMESPACE].fields:
        subset = tuple(_texts(metadata[SUBSET_NAMESPACE].fields[SUBSET]))
    if LB_NAMESPACE in metadata and SERVED in metadata[LB_NAMESPACE].fields:
        served = metadata[LB_NAMESPACE].fields[SERVED].string_value or None
    if message.HasField("protocol_config"):
        config = message.protocol_config
        modes = _mode(config.request_body_mode), _mode(config.response_body_mode)
    return Message(_part(message), subset, served, modes, message.observability_mode)


def _mode(number: int) -> BodyMode:
    """Return a mode; one that is not known yet is taken for a body that comes in pieces."""
    return _MODES.get(number, BodyMode.STREAMED)


def _part(message: Any) -> Headers | Body | Trailers | None:
    for direction in Direction:
        name = f"{direction.value}_headers"
        if message.HasField(name):
            found = getattr(message, name)
            return Headers(direction, dict(_pairs(found.headers)), found.end_of_stream)
        name = f"{direction.value}_body"
        if message.HasField(name):
            found = getattr(message, name)
            return Body(direction, found.body, found.end_of_stream)
        if message.HasField(f"{direction.value}_trailers"):
            return Trailers(direction)
    return None


def _pairs(header_map: Any) -> Iterator[tuple[str, str]]:
    for header in header_map.headers:
        value = header.raw_value.decode("utf-8", "replace") if header.raw_value else header.value
        yield header.key.lower(), value


def _texts(value: Any) -> Iterator[str]:
    """Read a list of texts, or one with commas."""
    if value.WhichOneof("kind") == "list_value":
        for entry in value.list_value.values:
            yield from _texts(entry)
    else:
        yield from filter(None, (part.strip() for part in value.string_value.split(",")))


class Destination(NamedTuple):
    """What is said of a request with a place to go.

    Attributes:
        endpoints: `ip:port`, the first first; the others are for retries.
        without: Headers of the request that are taken out.
        prefiller: `ip:port` of the replica that prefills it, if another does; for llm-d's sidecar.
    """

    endpoints: Sequence[str]
    without: Sequence[str] = ()
    prefiller: str = ""


def pass_headers(direction: Direction, destination: Destination | None = None) -> bytes:
    """Answer headers: they go on, with where to, if that is known."""
    answer = _CLASSES["ProcessingResponse"]()
    _send_to(answer, getattr(answer, f"{direction.value}_headers"), destination)
    return bytes(answer.SerializeToString())


def pass_body(direction: Direction, destination: Destination | None = None) -> bytes:
    """Answer a body, or a piece of one, that goes on as it came."""
    answer = _CLASSES["ProcessingResponse"]()
    _send_to(answer, getattr(answer, f"{direction.value}_body"), destination)
    return bytes(answer.SerializeToString())


def stream_body(direction: Direction, body: bytes, *, ends: bool) -> Iterator[bytes]:
    """Send back a body, in pieces, that the gateway has given away (`FULL_DUPLEX_STREAMED`)."""
    for first in range(0, max(1, len(body)), MAX_PIECE_BYTES):
        answer = _CLASSES["ProcessingResponse"]()
        part = getattr(answer, f"{direction.value}_body").response.body_mutation.streamed_response
        part.body = body[first : first + MAX_PIECE_BYTES]
        part.end_of_stream = ends and first + MAX_PIECE_BYTES >= len(body)
        yield bytes(answer.SerializeToString())


def pass_trailers(direction: Direction) -> bytes:
    """Answer trailers: they go on."""
    answer = _CLASSES["ProcessingResponse"]()
    getattr(answer, f"{direction.value}_trailers").SetInParent()
    return bytes(answer.SerializeToString())


def refuse(status: int, headers: Iterable[tuple[str, str]], body: bytes, details: str) -> bytes:
    """Tell the gateway to answer the client itself.

    Args:
        status: Of HTTP.
        headers: Of that answer.
        body: Of that answer.
        details: Why, for the gateway's log.
    """
    answer = _CLASSES["ProcessingResponse"]()
    immediate = answer.immediate_response
    immediate.status.code = status
    for name, value in headers:
        _set(immediate.headers, name, value)
    immediate.body = body
    immediate.details = details
    return bytes(answer.SerializeToString())


def _send_to(answer: Any, part: Any, destination: Destination | None) -> None:
    part.response.SetInParent()
    if destination is None:
        return
    text = ",".join(destination.endpoints)
    _set(part.response.header_mutation, DESTINATION, text)
    if destination.prefiller:
        _set(part.response.header_mutation, PREFILLER_HEADER, destination.prefiller)
    part.response.header_mutation.remove_headers.extend(destination.without)
    part.response.clear_route_cache = True
    answer.dynamic_metadata.update({LB_NAMESPACE: {DESTINATION: text}})


def _set(mutation: Any, name: str, value: str) -> None:
    option = mutation.set_headers.add(append_action=_OVERWRITE)
    option.header.key, option.header.raw_value = name, value.encode()
