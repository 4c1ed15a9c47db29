"""CPU time of what lies between a client and an engine's scheduler: HTTP, validation, tokeniser.

Runs in an environment of its own with `tokenizers fastapi uvicorn aiohttp`, as in engines' servers:

    ENV/bin/python benchmarks/front_end.py

A byte-level BPE of 32,768 tokens is trained on the sources of Python's library; prompts are random
tokens of it as text, as benchmarks of serving send them. The server takes a completion request as
OpenAI's API has it, and encodes the prompt. Prints CPU milliseconds of the server and of the client
for a request, by prompt tokens, and the line through them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from pydantic import BaseModel

VOCABULARY, SIZES, REPEATS = 32_768, (16, 1024, 4096, 8192), 20
JSON = {"Content-Type": "application/json"}


class Completion(BaseModel):
    """Of the fields of OpenAI's API those that a benchmark sends."""

    model: str
    prompt: str
    max_tokens: int
    stream: bool = True
    ignore_eos: bool = True


def main() -> None:
    """Train, serve, measure."""
    if len(sys.argv) == 3:
        serve(sys.argv[1], int(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "tokenizer.json")
        tokenizer = trained(path)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen([sys.executable, __file__, path, str(port)])
        try:
            points = asyncio.run(measure(tokenizer, port))
        finally:
            server.terminate()
            server.wait()
    print("| prompt tokens | server, ms | client, ms |\n|--:|--:|--:|")
    for size, (of_server, of_client) in points.items():
        print(f"| {size} | {of_server:.2f} | {of_client:.2f} |")
    both = [sum(points[size]) for size in SIZES]
    slope, start = statistics.linear_regression(SIZES, both)
    print(f"\n{start:.2f} ms a request and {1e3 * slope:.2f} us a prompt token")


def trained(path: str):
    """Train a tokeniser and write it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer.train([str(p) for p in sorted(library.glob("*/*.py"))[:600]], trainer)
    tokenizer.save(path)
    return tokenizer


def serve(path: str, port: int) -> None:
    """Answer completion requests with the number of their tokens and the CPU time so far."""
    import uvicorn
    from fastapi import FastAPI
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete(request: Completion) -> dict[str, float]:
        tokens = tokenizer.encode(request.prompt).ids
        return {"tokens": len(tokens), "cpu_s": time.process_time()}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


async def measure(tokenizer, port: int) -> dict[int, tuple[float, float]]:
    """CPU milliseconds of server and client for a request, by prompt tokens."""
    import aiohttp

    rng, points = random.Random(0), {}
    url = f"http://127.0.0.1:{port}/v1/completions"
    async with aiohttp.ClientSession() as session:

        async def send(prompt: str) -> float:
            body = {"model": "toy", "prompt": prompt, "max_tokens": 1024}
            async with session.post(url, data=json.dumps(body), headers=JSON) as answer:
                return float((await answer.json())["cpu_s"])

        for _ in range(200):
            try:
                await send("begin")
                break
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)
        for size in SIZES:
            of_server, of_client = [], []
            for _ in range(REPEATS):
                prompt = tokenizer.decode([rng.randrange(VOCABULARY) for _ in range(size)])
                before_s, began_s = await send("a"), time.process_time()
                after_s = await send(prompt)
                of_client.append(1e3 * (time.process_time() - began_s))
                of_server.append(1e3 * (after_s - before_s))
            points[size] = statistics.median(of_server), statistics.median(of_client)
    return points


os.environ["TOKENIZERS_PARALLELISM"] = "false"
if __name__ == "__main__":
    main()
