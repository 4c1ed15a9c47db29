"""Two running routers, and a router beside a picker, tell each other by UDP what they have."""

import socket

import pytest

from servegym.errors import ConfigError
from servegym.policy.contract import OUTSTANDING_REQUESTS
from servegym.serve.picker.app import Picker
from servegym.serve.picker.config import PickerConfig
from servegym.serve.router.app import Router
from servegym.serve.router.config import parse_config

from ..running import RATES, run, running, until  # noqa: TID252 - tests are no package


def free_ports(count):
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def peers(own, other):
    return {"port": own, "addresses": [f"localhost:{other}"], "interval_s": 0.01}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_two_routers_count_each_others_requests(num_workers):
    async def test() -> None:
        first, second = free_ports(2)
        async with (
            running(2, num_workers, peers=peers(first, second)) as it,
            running(2, peers=peers(second, first)) as other,
        ):
            job = it.router.dispatcher.arrive(range(100), key="k")
            there = it.router.dispatcher.decide(job).action
            await until(lambda: other.state.replicas[OUTSTANDING_REQUESTS, there] == 1.0)
            for _ in range(3):  # the other replica is free
                _, _, headers = await other.post({"model": "m", "prompt": "x", "max_tokens": 1})
                assert headers["X-Servegym-Replica"] == f"r{1 - there}"
            async with other.client.get(other.admin + "/state") as response:
                (peer,) = (await response.json())["peers"]
            assert not peer["silent"]
            assert peer["outstanding_requests"] == 1
            assert peer["age_s"] < 2.0
            _, text = await other.get("/metrics")
            assert f'servegym_peer_silent{{peer="127.0.0.1:{first}"}} 0.0' in text
            it.router.dispatcher.end(job, "cancelled")
            await until(lambda: other.state.replicas[OUTSTANDING_REQUESTS, there] == 0.0)

    run(test)


def test_a_router_and_a_picker_count_each_others_requests():
    async def test() -> None:
        first, second = free_ports(2)
        async with running(2, peers=peers(first, second)) as it:
            replicas = [
                {"name": f"r{i}", "url": replica.url, "rates": RATES}
                for i, replica in enumerate(it.replicas)
            ]
            picker = Picker(
                PickerConfig.model_validate(
                    {
                        "replicas": replicas,
                        "listen": {"port": 0, "admin_port": 0},
                        "peers": peers(second, first),
                    }
                )
            )
            await picker.start()
            try:
                job = picker.dispatcher.arrive(range(100), key="k")
                there = picker.dispatcher.decide(job).action
                await until(lambda: it.state.replicas[OUTSTANDING_REQUESTS, there] == 1.0)
                async with it.client.get(f"http://127.0.0.1:{picker.admin_port}/state") as response:
                    (peer,) = (await response.json())["peers"]
                assert not peer["silent"]
            finally:
                await picker.stop()

    run(test)


def test_a_port_that_is_taken_is_said():
    async def test() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            config = parse_config(
                {
                    "replicas": [{"name": "a", "url": "http://127.0.0.1:9", "rates": RATES}],
                    "listen": {"port": 0, "admin_port": 0},
                    "peers": peers(port, 9),
                },
                "test",
            )
            with pytest.raises(ConfigError, match=f"peers cannot be heard at 127.0.0.1:{port}"):
                await Router(config).start()

    run(test)
