"""Looking at replicas before serving: each thing that is wrong gets a sentence."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from servegym.cli import main
from servegym.serve.router.config import parse_config
from servegym.serve.router.probe import probe

from .running import RATES, VirtualTimeLoop, run
from .upstream import Upstream


def config(*urls, **settings):
    replicas = [{"name": f"r{i}", "url": u, "rates": RATES} for i, u in enumerate(urls)]
    return parse_config({"replicas": replicas, **settings}, "test")


def test_good_replicas_are_nothing_to_speak_of():
    async def test():
        one, two = Upstream(), Upstream()
        await asyncio.gather(one.start(), two.start())
        assert await probe(config(one.url, two.url)) == []
        await asyncio.gather(one.stop(), two.stop())

    run(test)


def test_a_wrong_url_is_noticed():
    async def test():
        there = Upstream()
        await there.start()
        free = Upstream()
        await free.start()
        gone = free.url
        await free.stop()
        said = await probe(config(there.url, gone, f"{there.url}/openai", "http://no.invalid:1"))
        assert len(said) == 5
        assert said[0].startswith(f"r1: {gone}/health cannot be reached (")
        assert said[0].endswith("start it, or correct its url")
        assert said[1].startswith(f"r2: {there.url}/openai/health answers 404: correct its url")
        assert "r2: " in said[2]
        assert "/openai/v1/models answers 404 and no list of models: correct" in said[2]
        assert said[3] == f"r2: {there.url}/openai/metrics: the metrics page answers 404"
        assert said[4].startswith("r3: http://no.invalid:1/health cannot be reached (")
        await there.stop()

    run(test)


class Odd:
    """A server that answers everything in one odd way."""

    def __init__(self, answer) -> None:
        self.answer = answer

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get("/{path:.*}", self.answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *error):
        await self.runner.cleanup()


def test_a_server_that_says_nothing_is_given_up_in_time():
    async def silent(request):
        await asyncio.sleep(60)

    async def test():
        async with Odd(silent) as url:
            said = await probe(config(url, health={"timeout_s": 0.05}))
        assert said == [
            f"r0: {url}/health has not answered in 0.05 s: start it, or correct its url"
        ]

    run(test, loop=VirtualTimeLoop)


@pytest.mark.parametrize(
    ("answer", "sentences"),
    [
        (
            web.Response(text="hello", content_type="text/html"),
            ["answers 200 and no list of models", "has no vllm:num_requests_running"],
        ),
        (
            web.Response(text="{]", content_type="application/json"),
            ["gives no proper answer (JSONDecodeError)"],
        ),
        (
            web.Response(text='{"data": 7}', content_type="application/json"),
            ["no list of models", "has no vllm:num_requests_running"],
        ),
    ],
)
def test_what_is_no_engine_is_noticed(answer, sentences):
    async def odd(request):
        return web.Response(body=answer.body, content_type=answer.content_type)

    async def test():
        async with Odd(odd) as url:
            said = await probe(config(url))
        assert len(said) == len(sentences)
        assert all(a in b for a, b in zip(sentences, said, strict=True))

    run(test)


def test_a_replica_that_wants_a_key_is_asked_with_it(monkeypatch):
    async def guarded(request):
        if request.path == "/v1/models" and request.headers.get("Authorization") != "Bearer k":
            return web.Response(status=401)
        return web.json_response({"data": []})

    async def test():
        async with Odd(guarded) as url:
            monkeypatch.delenv("UP", raising=False)
            said = await probe(config(url))
            assert "/v1/models answers 401: name the variable with its API key" in said[0]
            monkeypatch.setenv("UP", "k")
            said = await probe(config(url, upstream_key_env="UP"))
            assert not any("models" in sentence for sentence in said)

    run(test)


def test_check_names_every_problem_and_fails(tmp_path, capsys):
    path = tmp_path / "router.yaml"
    keys = tmp_path / "keys.yaml"
    keys.write_text("alice: sk-alice-0123456789")
    rates = "{prefill_tokens_per_s: 1000, decode_step_s: 0.01}"
    path.write_text(
        f"replicas: [{{name: a, url: 'http://127.0.0.1:9', rates: {rates}}}]\n"
        f"auth: {{keys_file: {keys}}}\n"
        "tenants: {alice: {}, bob: {max_concurrent: 1}}\n"
    )
    command = ["serve", "router", "--config", str(path), "--check"]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2
    said = capsys.readouterr()
    out = " ".join(said.out.split())
    assert "tenant bob has limits but no key" in out
    assert "a: http://127.0.0.1:9/health cannot be reached" in out
    assert "(2, see above); --offline leaves the replicas out" in " ".join(said.err.split())
    path.write_text(path.read_text().replace(", bob: {max_concurrent: 1}", ""))
    main([*command, "--offline"])
    assert "router.yaml is good" in " ".join(capsys.readouterr().out.split())
