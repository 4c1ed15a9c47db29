"""Route requests through the real LiteLLM router by a servegym policy.

    python check_litellm.py

Three OpenAI-compatible servers of different speed in this process, with vLLM's metrics.
"""

from __future__ import annotations

import asyncio
import collections
import json
import time
from typing import Any

import litellm
import numpy as np
from aiohttp import web

from servegym.serve.litellm import LiteLLMConfig, install

NUM_REQUESTS = 120
CONCURRENT = 12
TOKEN_S = (0.02, 0.05, 0.1)
OUTPUT_TOKENS = 12


class Engine:
    """Streams tokens at a pace of its own, four requests at a time."""

    def __init__(self, token_s: float) -> None:
        self.token_s = token_s
        self.slots = asyncio.Semaphore(4)
        self.num_running = self.num_waiting = self.num_answered = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer a chat completion as a stream."""
        await request.json()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        self.num_waiting += 1
        async with self.slots:
            self.num_waiting -= 1
            self.num_running += 1
            await response.prepare(request)
            for i in range(OUTPUT_TOKENS):
                await asyncio.sleep(self.token_s)
                last = i == OUTPUT_TOKENS - 1
                await self.event(response, {"content": "word "}, "stop" if last else None)
            await response.write(b"data: [DONE]\n\n")
            self.num_running -= 1
        self.num_answered += 1
        return response

    async def event(self, response: Any, delta: dict[str, str], reason: str | None) -> None:
        """Send one piece."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        await response.write(
            b"data: " + json.dumps(chunk | {"choices": [choice]}).encode() + b"\n\n"
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """Say what vLLM says."""
        lines = {
            "vllm:num_requests_running": self.num_running,
            "vllm:num_requests_waiting": self.num_waiting,
            "vllm:kv_cache_usage_perc": 0.1,
        }
        return web.Response(text="".join(f"{name} {value}\n" for name, value in lines.items()))

    async def serve(self) -> str:
        """Listen on a free port; return the address."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/metrics", self.metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        return f"http://127.0.0.1:{port}"


def config(urls: list[str]) -> LiteLLMConfig:
    """Tell servegym what the engines are."""
    return LiteLLMConfig.model_validate(
        {
            "deployments": {
                str(i): {
                    "rates": {
                        "prefill_tokens_per_s": 1e4,
                        "decode_step_s": token_s,
                        "decode_seq_s": token_s / 4,
                    },
                    "metrics_url": f"{url}/metrics",
                }
                for i, (url, token_s) in enumerate(zip(urls, TOKEN_S, strict=True))
            },
            "dispatch": {"runtime": {"policy": "added-delay"}},
        }
    )


async def drive(router: Any) -> list[float]:
    """Keep some requests under way; return how long they took."""
    gate = asyncio.Semaphore(CONCURRENT)

    async def one(i: int) -> float:
        async with gate:
            begin_s = time.perf_counter()
            messages = [{"role": "user", "content": f"question {i}"}]
            stream = await router.acompletion("m", messages=messages, stream=True)
            words = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(words).split() == ["word"] * OUTPUT_TOKENS
            return time.perf_counter() - begin_s

    return list(await asyncio.gather(*(one(i) for i in range(NUM_REQUESTS))))


async def main() -> None:
    """Serve, route without and with a policy, check the books."""
    engines = [Engine(token_s) for token_s in TOKEN_S]
    urls = [await engine.serve() for engine in engines]
    router = litellm.Router(
        model_list=[
            {
                "model_name": "m",
                "litellm_params": {"model": "openai/m", "api_base": f"{url}/v1", "api_key": "none"},
                "model_info": {"id": str(i)},
            }
            for i, url in enumerate(urls)
        ]
    )
    shuffled = await drive(router)
    before = [engine.num_answered for engine in engines]
    strategy = install(router, config(urls))
    await strategy.start()
    decided = await drive(router)
    for _ in range(50):  # LiteLLM tells of ends from tasks of its own
        await asyncio.sleep(0.1)
        left = sum(strategy.dispatcher.state.outstanding(i) for i in range(3))
        if not left:
            break
    counts = strategy.dispatcher.runtime.counters.snapshot()
    latency = strategy.dispatcher.state.replicas
    share = collections.Counter(
        {i: e.num_answered - b for i, (e, b) in enumerate(zip(engines, before, strict=True))}
    )
    await strategy.stop()
    print(f"answered by {dict(share)}, left in books {left}, {counts['num_policy']} decisions "
          f"by the policy, {counts['num_fallback']} by the fallback")  # fmt: skip
    print(f"mean {1e3 * np.mean(shuffled):.0f} ms by LiteLLM's shuffle, "
          f"{1e3 * np.mean(decided):.0f} ms by added-delay")  # fmt: skip
    assert left == 0
    assert sum(share.values()) == NUM_REQUESTS
    assert counts["num_policy"] == NUM_REQUESTS
    assert share[0] > share[1] > share[2]
    assert (latency[5, :2] > 0).all(), "no latency was learned"


if __name__ == "__main__":
    asyncio.run(main())
