"""What two replicas are told that do one request together: the protocols of the engines' servers.

- `nixl`, of vLLM with its NIXL connector: the replica that prefills is asked first, for one token,
  with `kv_transfer_params` that say so, and those of its answer go into what the other is asked
  (vllm-project/vllm, tests/v1/kv_connector/nixl_integration/toy_proxy_server.py; llm-d's sidecar,
  llm-d/llm-d-routing-sidecar, internal/proxy/connector_nixlv2.go, says the same).
- `sglang`, of SGLang: both are asked at once, with the address of the one that prefills and a
  number under which they find each other (sgl-project/sglang, sgl-model-gateway/src/routers/http/
  pd_router.rs, `inject_bootstrap_into_value`; numbers of 63 bits: pd_types.rs).
- `sidecar`, of llm-d: only the replica that decodes is asked, and a header names the other, which
  the sidecar in front of it asks itself (internal/proxy/chat_completions.go there).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from servegym.serve.router.forms import CHAT, COMPLETION, Form
from servegym.serve.router.json_body import parse_json
from servegym.serve.router.stream import Reader
from servegym.serve.router.upstream import UpstreamError

#: What a replica is asked that is to keep the KV for another.
_TO_KEEP = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
#: What is said of more than one token, which is all that a prefill makes.
_OF_LONGER = ("stream_options", "min_tokens", "min_completion_tokens")
_ROOM_BITS = 63
#: What a replica says of the KV that it keeps; `None`: it keeps none.
Params = Mapping[str, object] | None


class PrefillError(UpstreamError):
    """Raised when a replica fails the prefill of a request that another is to decode meanwhile."""


class Prefilled(NamedTuple):
    """What a replica answers that has prefilled a request.

    Attributes:
        params: Its `kv_transfer_params`; `None` if it keeps nothing for another.
        cached_tokens: Prompt tokens that it found cached, as it reports, if it does.
    """

    params: Params
    cached_tokens: int | None


def is_divisible(form: Form, fields: Mapping[str, object]) -> bool:
    """Whether two replicas can do a request: one prompt, one answer, and nothing of the prompt.

    Args:
        form: Of its body.
        fields: Of its body.
    """
    if form not in (COMPLETION, CHAT):
        return False
    if any(fields.get(name) not in (None, 1) for name in ("n", "best_of")):
        return False
    if fields.get("echo") or fields.get("prompt_logprobs") is not None:
        return False
    prompt = fields.get("prompt")
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return not several and not fields.get("prompt_embeds")


def prefill_body(body: bytes) -> bytes:
    """Write what the replica is asked that prefills and keeps the KV (`nixl`)."""
    fields = {name: value for name, value in _fields(body).items() if name not in _OF_LONGER}
    fields |= {"stream": False, "max_tokens": 1, "kv_transfer_params": _TO_KEEP}
    if "max_completion_tokens" in fields:
        fields["max_completion_tokens"] = 1
    return json.dumps(fields).encode()


def decode_body(body: bytes, params: Params) -> bytes:
    """Write what the replica is asked that fetches the KV and decodes (`nixl`).

    Args:
        body: The client's; what it says of KV itself is left out.
        params: As the other has answered; `None`: there is nothing to fetch.
    """
    fields = {name: v for name, v in _fields(body).items() if name != "kv_transfer_params"}
    if params is not None:
        fields["kv_transfer_params"] = params
    return json.dumps(fields).encode()


def pair_body(body: bytes, prefill_url: str, bootstrap_port: int) -> bytes:
    """Write what both replicas are asked at once (`sglang`).

    Args:
        body: The client's.
        prefill_url: Of the replica that prefills.
        bootstrap_port: Where it is found by the other.
    """
    fields = _fields(body)
    fields["bootstrap_host"] = urlsplit(prefill_url).hostname
    fields["bootstrap_port"] = bootstrap_port
    fields["bootstrap_room"] = secrets.randbits(_ROOM_BITS)
    return json.dumps(fields).encode()


def _fields(body: bytes) -> dict[str, Any]:
    fields = parse_json(body)
    assert isinstance(fields, dict)  # it was read before
    return fields


def read_prefilled(answer: bytes) -> Prefilled:
    """Read the answer of a replica that has prefilled.

    Raises:
        UpstreamError: If it is none.
    """
    try:
        document = parse_json(answer)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise UpstreamError("empty")
    reader = Reader(is_stream=False)
    reader.feed(answer)
    reader.close()
    params = document.get("kv_transfer_params")
    return Prefilled(params if isinstance(params, dict) else None, reader.usage()[2])
