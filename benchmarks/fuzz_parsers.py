"""Every reader of what an engine, a client or a file sends, fed with a million broken inputs.

Each must give a result or its own error, in time that is linear in the length. Inputs are good ones
that were changed (cut, doubled, swapped, with runs, numbers and words that readers trip over), some
of them tens of kilobytes long; the same seed makes the same inputs.

    python benchmarks/fuzz_parsers.py [--inputs 1000000] [--seed 0] [READER ...]

For each reader it prints the inputs, how many were taken, the median and the worst time a byte of
inputs above 1 kB (the thread's own time on the CPU, the best of three), and for runs of single
characters and words how many times as long eight times the length takes, at worst: 8 is linear, 64
quadratic. It ends with 1, and writes the input, at the first error that is not the reader's own.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

from multidict import CIMultiDict

from servegym.documents import load_yaml
from servegym.errors import ServeGymError
from servegym.serve.engine import asks
from servegym.serve.engine.faults import Fault
from servegym.serve.engine.server import output_tokens
from servegym.serve.monitoring.metrics import read_metrics
from servegym.serve.requests.prompt import PrefixConfig, PromptReader, Size
from servegym.serve.router.auth import Keys
from servegym.serve.router.errors import RequestError
from servegym.serve.router.forms import (
    CHAT,
    COMPLETION,
    MESSAGES,
    POOLING,
    RERANK,
    RESPONSES,
    SCORE,
    Form,
)
from servegym.serve.router.framing import Chunked, FramingError
from servegym.serve.router.head import HeadError, may_begin_request, read_request_head
from servegym.serve.router.headers import DEFAULT_FORWARDED, HeaderFilter, retry_after_s
from servegym.serve.router.multipart import read_form
from servegym.serve.router.request import read_request
from servegym.serve.router.stream import Reader
from servegym.workloads.readers import read_trace

#: A reader's own words for what it does not take.
REFUSALS = (ServeGymError, RequestError, HeadError, FramingError)


class Target(NamedTuple):
    """A reader.

    Attributes:
        read: Takes an input, or refuses it with one of `REFUSALS`.
        good: Inputs that it takes.
        words: What its inputs are made of.
        share: Of all inputs, relative to the others.
    """

    read: Callable[[bytes], object]
    good: tuple[bytes, ...]
    words: tuple[bytes, ...]
    share: float = 1.0


_NUMBERS = (b"0", b"-1", b"1e400", b"9" * 20, b"9" * 400, b"9" * 5000, b"NaN", b"-Infinity", b"0x1")
_BYTES = (b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", "\u0663\u2028".encode(), b"\r", b"\n")
_JSON = (b"{", b"}", b"[", b"]", b'"', b"\\", b"\\ud800", b":", b",", b"null", b"true", b" ")

_VLLM = b"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0 1700000000000
vllm:kv_cache_usage_perc{engine="0",model_name="m \\"x\\" }"} 0.25
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0
"""
_SGLANG = b"""sglang:num_running_reqs{dp_rank="0",priority="",tp_rank="0"} 6
sglang:num_queue_reqs{dp_rank="0",tp_rank="0"} 2
sglang:token_usage{tp_rank="0"} 0.28
sglang:max_total_num_tokens{tp_rank="0"} 41000
"""
_CHAT = json.dumps(
    {
        "model": "m",
        "messages": [
            {"role": "system", "content": "be kind"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "see"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                ],
            },
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        ],
        "tools": [{"type": "function"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 16,
        "seed": 7,
    }
).encode()
_COMPLETION = b'{"model": "m", "prompt": "hello there", "max_tokens": 16.0, "stream": "true"}'
_TOKENS = b'{"prompt": [[1, 2, 3], [4]], "max_tokens": 16, "vllm_xargs": {"a": 1}, "priority": 3}'
_MESSAGES = json.dumps(
    {
        "model": "m",
        "system": [{"type": "text", "text": "be kind"}],
        "messages": [
            {"role": "user", "content": [{"type": "image", "source": {"data": "AAAA"}}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "content": [{"text": "x"}]}]},
        ],
        "max_tokens": 16,
    }
).encode()
_RESPONSES = (
    b'{"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}, '
    b'{"type": "function_call", "arguments": "{}"}], "instructions": "y", "max_output_tokens": 9}'
)
_POOLED = b'{"input": ["a", [1, 2]], "query": "q", "documents": ["a", {"text": "b"}]}'
_PAIRS = b'{"text_1": ["a", {"content": [{"text": "b"}]}], "text_2": ["c"]}'
_FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b\r\n'
    b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
)
_TYPED = (
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":3,'
    b'"cache_read_input_tokens":1}}}\n\ndata: {"type":"content_block_delta","delta":{}}\n\n'
    b'data: {"type":"response.created","response":{"usage":null}}\n\n'
    b'data: {"type":"response.output_text.delta","delta":"x"}\n\n'
    b'data: {"type":"response.failed","response":{"error":{"message":"x"}}}\n\n'
    b'data: {"type":"response.completed","response":{"usage":{"output_tokens":2}}}\n\n'
)
_STREAM = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    b': 1.5 1.2\ndata: {"choices":[{"index":0,"delta":{"content":"a b"},"finish_reason":null}]}\n\n'
    b'event: message\r\ndata: {"choices":[],\r\ndata: "usage":{"prompt_tokens":3,'
    b'"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}\r\n\r\n'
    b"data:[DONE]\n\n"
)
_FAILED = b'event: error\ndata: {"error": {"message": "x", "code": 503}}\n\n'
_ANSWER = b'{"choices":[{"text":"x"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
_MOONCAKE = (
    b'{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
    b'{"timestamp": 900, "input_length": 100, "output_length": 5, "hash_ids": [1]}\n'
)
_AZURE = b"""TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0,110,27
"""
_LOG = (
    b'{"key": "a", "arrival_s": 1.0, "prompt_tokens": 5, "output_tokens": 3, "slo_class": 0,'
    b' "tenant": 1, "hash_ids": [18446744073709551615], "status": "finished", "replica": 0}\n'
)
_FOLLOWED = (
    b'{"key": "b", "arrival_s": 1.5, "prompt_tokens": 5, "output_tokens": 3, "status": "finished",'
    b' "e2e_s": 2.5, "follows": null, "decisions": []}\n'
    b'{"key": "c", "arrival_s": 5.0, "prompt_tokens": 5, "output_tokens": 3, "status": "failed",'
    b' "e2e_s": 1, "follows": {"key": "b", "delay_s": 1.0, "by": "prefix"}, "decisions": []}\n'
)
_ROUTER = b"""replicas:
  - {name: a, url: "http://127.0.0.1:8000", rates: &r {prefill_tokens_per_s: 1, decode_step_s: 1}}
  - {name: b, url: "http://127.0.0.1:8001", rates: *r}
"""

_PROMPTS = PromptReader(PrefixConfig())
_KEYS = Keys({"alice": ["sk-alice-0123456789"]})
_HEAD = (
    b"POST /v1/completions?a=b HTTP/1.1\r\nHost: router:8080\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer sk-alice-0123456789\r\nConnection: close\r\nContent-Length: 9\r\n\r\n"
)
_CHUNKS = b"5\r\nhello\r\n1A;a=b\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nA: b\r\n\r\n"
_FILTER = HeaderFilter([*DEFAULT_FORWARDED, "x-*"])


def _text(data: bytes) -> str:
    """As HTTP servers read headers and the command line: every byte means something."""
    return data.decode("utf-8", "surrogateescape")


def _metrics(data: bytes) -> None:
    read_metrics(data.decode("utf-8", "replace"), None, 0.0)


def _stream(data: bytes) -> None:
    reader = Reader(is_stream=True)
    size = 1 + sum(data[:4]) % 97  # in pieces, as a network cuts them
    for i in range(0, len(data), size):
        reader.feed(data[i : i + size])
    _finish(reader)


def _whole_answer(data: bytes) -> None:
    reader = Reader(is_stream=False)
    reader.feed(data[: len(data) // 2])
    reader.feed(data[len(data) // 2 :])
    _finish(reader)


def _finish(reader: Reader) -> None:
    reader.close()
    prompt, completion, _ = reader.usage()
    assert reader.output_tokens() >= 0
    assert (prompt or 0) < 2**31
    assert (completion or 0) < 2**31


def _request(form: Form) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        prompt = read_request(data, form, slo_field="service_tier").prompt
        if isinstance(prompt, str | Size) or hasattr(prompt, "dtype"):
            measured = _PROMPTS.read(prompt)
            assert measured.tokens >= 1

    return read


def _headers(data: bytes) -> None:
    lines = [line.partition(":") for line in _text(data).split("\n")]
    headers = CIMultiDict((name, value.strip()) for name, _, value in lines)
    _KEYS.tenant(headers.get("Authorization"))
    retry_after_s(headers.items())
    _FILTER.forwarded(headers.items())
    output_tokens(headers)


def _request_head(data: bytes) -> None:
    may_begin_request(data)
    head = read_request_head(data)
    assert head.length is None or head.length >= 0


def _chunks(data: bytes) -> None:
    framing = Chunked()
    for at in range(0, len(data), 1000):
        framing.feed(data[at : at + 1000])
        if framing.ended:
            return


def _trace(suffix: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        path = Path(_folder(), f"trace{suffix}")
        path.write_bytes(data)
        read_trace(path)

    return read


def _folder() -> str:
    if not _FOLDER:
        _FOLDER.append(tempfile.TemporaryDirectory())
    return _FOLDER[0].name


_FOLDER: list[tempfile.TemporaryDirectory[str]] = []


def _yaml(data: bytes) -> None:
    import yaml

    try:
        load_yaml(data.decode("utf-8", "replace"))
    except yaml.YAMLError as error:
        raise RequestError(400, str(error), "yaml") from error


TARGETS: Mapping[str, Target] = {
    "metrics": Target(
        _metrics,
        (_VLLM, _SGLANG, _VLLM + _SGLANG),
        (b"vllm:num_requests_running", b'{a="', b'"} 1', b"{", b"}", b'"', b",", b" ", b"\t", b"#"),
    ),
    "stream": Target(
        _stream,
        (_STREAM, _FAILED, _STREAM * 3, _TYPED),
        (b"data:", b"data: ", b"event: error", b"[DONE]", b": ", b"id: 1", b"\r\n\r\n", *_JSON),
    ),
    "answer": Target(
        _whole_answer, (_ANSWER, b'{"error": "x"}'), (b'"usage":', b'"prompt_tokens": ', *_JSON)
    ),
    "chat": Target(
        _request(CHAT), (_CHAT,), (b'"messages":', b'"role":', b'"content":', b"\\u0004", *_JSON)
    ),
    "completion": Target(
        _request(COMPLETION), (_COMPLETION, _TOKENS), (b'"prompt":', b'"max_tokens":', *_JSON)
    ),
    "messages": Target(_request(MESSAGES), (_MESSAGES,), (b'"type":', b'"content":', *_JSON)),
    "responses": Target(_request(RESPONSES), (_RESPONSES,), (b'"input":', b'"content":', *_JSON)),
    "pooling": Target(_request(POOLING), (_POOLED,), (b'"input":', b'"messages":', *_JSON)),
    "rerank": Target(_request(RERANK), (_POOLED,), (b'"query":', b'"documents":', *_JSON)),
    "score": Target(_request(SCORE), (_PAIRS,), (b'"text_1":', b'"text_2":', *_JSON)),
    "form": Target(
        lambda data: read_form(data, "multipart/form-data; boundary=b"),
        (_FORM,),
        (b"--b", b"--b--", b"\r\n", b"\r\n\r\n", b'name="x"', b"filename=", b'"'),
    ),
    "engine-chat": Target(lambda d: asks.parse(asks.Chat, d).text, (_CHAT,), (b'"type":', *_JSON)),
    "engine-completion": Target(
        lambda d: asks.parse(asks.Completion, d).text,
        (_COMPLETION, _TOKENS.replace(b", [4]", b"")),
        (b'"prompt":', b'"max_tokens":', *_JSON),
    ),
    "headers": Target(
        _headers,
        (
            b"Authorization: Bearer sk-alice-0123456789\nRetry-After: 5\nX-Output-Tokens: 7\n"
            b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\nbaggage: a=b",
        ),
        (b"Authorization:", b"Bearer", b"X-Output-Tokens:", b"Retry-After:", b"x-a:", b" ", b":"),
    ),
    "request-head": Target(
        _request_head,
        (_HEAD,),
        (b"\r\n", b"Content-Length: 5\r\n", b"X-A:", b": ", b"/", b" HTTP/1.1"),
    ),
    "chunks": Target(
        _chunks, (_CHUNKS,), (b"5\r\nhello\r\n", b"0\r\n", b"\r\n", b";a=b", b"ff", b"A: b\r\n")
    ),
    "fault": Target(
        lambda d: Fault.parse(_text(d)),
        (b"30:0:slow=10", b"60:1:recover"),
        (b":", b"=", b"slow", b"hang", b"."),
        0.3,
    ),
    "yaml": Target(_yaml, (_ROUTER,), (b"- ", b"{", b"}", b"a: ", b"&a ", b"*a", b"<<: "), 0.03),
    "trace-jsonl": Target(
        _trace(".jsonl"),
        (_MOONCAKE, _LOG, _FOLLOWED),
        (b'"hash_ids":', b'"timestamp":', *_JSON),
        0.1,
    ),
    "trace-csv": Target(
        _trace(".csv"), (_AZURE,), (b",", b'"', b"2023-11-16", b"TIMESTAMP", b"1,234"), 0.1
    ),
}


def mutated(rng: random.Random, target: Target) -> bytes:
    """Make an input: a good one, changed in a few places, sometimes very long."""
    data = bytearray(rng.choice(target.good))
    words = (target.words, _NUMBERS, _BYTES)
    for _ in range(rng.randrange(6)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randrange(1, 40))
        how = rng.randrange(6)
        if how == 0:
            del data[at:end]
        elif how == 1:
            data[at:at] = data[at:end] * rng.randrange(1, 20)
        elif how == 2:
            data[at:end] = rng.randbytes(end - at)
        elif how == 3:
            data[at:end] = rng.choice(rng.choice(words))
        elif how == 4:
            many = 1 << rng.randrange(1, 15 if rng.random() < 0.02 else 8)
            data[at:at] = rng.choice(target.words) * many
        else:
            other = rng.randrange(len(data) + 1)
            data[at:end], data[other : other + 8] = data[other : other + 8], data[at:end]
    return bytes(data)


def seconds(target: Target, data: bytes) -> tuple[float, bool]:
    """Feed an input; return the seconds that it took, and whether it was taken."""
    begin = time.thread_time_ns()
    try:
        target.read(data)
        taken = True
    except REFUSALS:
        taken = False
    return (time.thread_time_ns() - begin) / 1e9, taken


def best(target: Target, data: bytes, times: int = 3) -> float:
    """Return the least seconds that an input takes."""
    return min(seconds(target, data)[0] for _ in range(times))


def growth(target: Target) -> tuple[float, bytes]:
    """Return how many times as long eight times as much takes, at worst, and of what."""
    worst, of = 0.0, b""
    for word in dict.fromkeys((*target.words, *_BYTES, b"a", b"1")):
        for before in (b"", target.good[0][: len(target.good[0]) // 2]):
            for after in (b"", target.good[0][len(target.good[0]) // 2 :]):
                short, long = (before + word * (n // len(word)) + after for n in (4096, 32768))
                # below some tens of microseconds the fixed part of the work is what is seen
                found = best(target, long) / max(best(target, short), 50e-6)
                if found > worst:
                    found = best(target, long, 5) / max(best(target, short, 5), 50e-6)
                if found > worst:
                    worst, of = found, before[-20:] + word + b"..."
    return worst, of


def fuzz(name: str, num_inputs: int, seed: int) -> None:
    """Feed one reader and print its row."""
    target, rng = TARGETS[name], random.Random(f"{seed} {name}")
    num_taken, num_bytes, slow, all_ns = 0, 0, 0.0, []
    for i in range(num_inputs):
        data = mutated(rng, target)
        num_bytes += len(data)
        try:
            taken_s, taken = seconds(target, data)
        except BaseException as error:
            path = Path(f"fuzz-{name}-{seed}-{i}.bin")
            path.write_bytes(data)
            print(f"{name}: input {i} of seed {seed}, now in {path}: {error!r:.200}")
            raise SystemExit(1) from error
        num_taken += taken
        if len(data) > 1024:
            per_byte = taken_s / len(data)
            if len(all_ns) < 10_000:
                all_ns.append(per_byte * 1e9)
            if per_byte > slow:  # again: the machine does other things too
                slow = max(slow, best(target, data) / len(data))
    times, of = growth(target)
    print(
        f"| {name} | {num_inputs:,} | {num_bytes / 1e6:.0f} | {num_taken / num_inputs:.0%} | "
        f"{median(all_ns) if all_ns else 0:.1f} | {slow * 1e9:.0f} | {times:.1f} | "
        f"`{of.decode('latin-1')!r}` |",
        flush=True,
    )


def main() -> None:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(TARGETS)}")
    given = parser.parse_args()
    names = given.readers or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        sys.exit(f"no reader {', '.join(unknown)}: choose of {', '.join(TARGETS)}")
    total = sum(TARGETS[name].share for name in names)
    print("| reader | inputs | MB | taken | ns/byte, median | worst | 8 x as long | of what |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    for name in names:
        fuzz(name, round(given.inputs * TARGETS[name].share / total + 0.5), given.seed)


if __name__ == "__main__":
    main()
