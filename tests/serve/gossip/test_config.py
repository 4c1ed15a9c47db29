"""The section `peers`."""

import pytest

from servegym.errors import ConfigError
from servegym.serve.gossip.config import PeersConfig, read_secret, split


def test_loopback_needs_no_secret():
    config = PeersConfig(addresses=("localhost:8083", "127.0.0.2:8082", "[::1]:8082"))
    assert read_secret(config) == b""


@pytest.mark.parametrize(
    "settings",
    [
        {"addresses": ("10.0.0.2:8082",)},
        {"addresses": ("routers.default.svc:8082",)},
        {"addresses": ("127.0.0.1:8083",), "host": "0.0.0.0"},
    ],
)
def test_elsewhere_a_secret_is_needed(settings):
    with pytest.raises(ValueError, match=r"needs secret_env, as .* is no loopback address"):
        PeersConfig(**settings)
    assert PeersConfig(**settings, secret_env="S").secret_env == "S"


@pytest.mark.parametrize("secret", [None, "short"])
def test_a_secret_that_is_missing_or_short_is_refused(monkeypatch, secret):
    monkeypatch.delenv("S", raising=False)
    if secret is not None:
        monkeypatch.setenv("S", secret)
    with pytest.raises(ConfigError, match=r"variable S must hold .* at least 16 characters"):
        read_secret(PeersConfig(addresses=("10.0.0.2:8082",), secret_env="S"))
    monkeypatch.setenv("S", "sixteen letters!")
    config = PeersConfig(addresses=("10.0.0.2:8082",), secret_env="S")
    assert read_secret(config) == b"sixteen letters!"


@pytest.mark.parametrize("address", ["", "host", "host:", ":8082", "host:99999", "host:1/x", "::1"])
def test_an_address_needs_host_and_port(address):
    with pytest.raises(ValueError, match=r"like 10\.0\.0\.2:8082"):
        split(address)


def test_silence_is_longer_than_a_lost_datagram():
    with pytest.raises(ValueError, match="at least four times interval_s"):
        PeersConfig(addresses=("127.0.0.1:8083",), interval_s=1.0, forget_after_s=3.0)
