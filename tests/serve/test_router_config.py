"""The router's file and its keys: what is wrong is said in one sentence."""

from __future__ import annotations

import asyncio
import time

import pytest

from servegym.errors import ConfigError
from servegym.serve.router.auth import Keys, read_keys, watch_file
from servegym.serve.router.config import AuthConfig, LimitConfig, parse_config, read_config
from servegym.serve.router.errors import RequestError
from servegym.serve.router.limits import Limits

from .linear import cpu_limit

CLASSES = "dispatch: {slo_classes: [{name: chat}, {name: batch}, {name: chat}]}\n"
RATES = "rates: {prefill_tokens_per_s: 20000, decode_step_s: 0.01}"
GOOD = f"replicas:\n  - {{name: a, url: 'http://10.0.0.1:8000/', {RATES}}}\n"


def two(url: str) -> str:
    return f"{GOOD}  - {{name: b, url: '{url}', {RATES}}}\n"


def test_a_short_file_is_enough(tmp_path):
    path = tmp_path / "router.yaml"
    path.write_text(GOOD)
    config = read_config(path)
    assert config.replicas[0].url == "http://10.0.0.1:8000"
    assert config.dispatch.runtime.fallback == "least-outstanding"
    assert config.listen.admin_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must hold keys and values, such as replicas and dispatch"),
        ("a: [", "line 1: not YAML"),
        ("replicas: []\n", "there is no replica: give replicas, replicas_file or discover"),
        (GOOD + "listen: {prot: 1}\n", "unknown key listen.prot; did you mean port"),
        (GOOD + "dispatch: {runtime: {polcy: x}}\n", r"dispatch.runtime.polcy; did you mean pol"),
        (GOOD + "lisen: {}\n", "unknown key lisen; did you mean listen"),
        (GOOD + "listen: {admin_host: 0.0.0.0}\n", "must be a loopback address"),
        (GOOD + "auth: {}\n", "auth: needs keys_file or keys_env"),
        (GOOD + "request: {hold_s: -1}\n", "request.hold_s: .*greater than 0, got -1"),
        (GOOD + "limits: {slo_class: chat}\n", "unknown SLO class 'chat': choose one of default"),
        (GOOD.replace("http:", "ftp:"), "replicas.0.url: must be like http://host:port, got"),
        (GOOD.replace(":8000/", ":80000/"), "replicas.0.url: must be like http://host:port, got"),
        (GOOD.replace(":8000/", ":8000/?x=1"), "replicas.0.url: must be like http://host:port"),
        (GOOD.replace(":8000/", ":8000/v1/"), "replicas.0.url: must be without /v1: the router"),
        (two("http://10.0.0.1:8000"), "replicas a and b have the same url"),
        (two("HTTP://10.0.0.1:08000/"), "replicas a and b have the same url"),
        (GOOD + "tenants: {alice: {max_concurrent: 1}}\n", "tenants needs auth: without keys"),
        (GOOD + CLASSES, "names of SLO classes must differ, got chat twice"),
        (GOOD + "listen: {port: 1}\nlisten: {port: 2}\n", "line 4: .*key 'listen' is given twice"),
        (GOOD + "listen: {port: 1, port: 2}\n", "line 3: .*key 'port' is given twice"),
        ("replicas:\n  - {name: a, url: 'http://b'}\n", "a needs either hardware or rates"),
        (GOOD + GOOD.partition("\n")[2], "replica names must differ, got a twice"),
        (GOOD.replace(", decode_step_s: 0.01", ""), "rates.decode_step_s: field required"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "router.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as refused:
        read_config(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="no configuration at"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "x.yaml")


class TestKeys:
    ALICE, BOB = "sk-alice-0123456789", "sk-bob-01234567890"

    def test_tenants_by_key(self):
        keys = Keys({"alice": [self.ALICE, self.ALICE + "2"], "bob": [self.BOB]})
        assert keys.tenant(f"Bearer {self.ALICE}") == "alice"
        assert keys.tenant(f"bearer   {self.ALICE}2") == "alice"
        assert keys.tenant(f"Bearer {self.BOB}") == "bob"
        for wrong in (None, "", "Bearer", f"Bearer {self.BOB}x", self.BOB, f"Basic {self.BOB}"):
            assert keys.tenant(wrong) is None

    def test_file_and_environment_are_both_read(self, tmp_path, monkeypatch):
        path = tmp_path / "keys.yaml"
        path.write_text(f"alice: {self.ALICE}\nbob: [{self.BOB}]\n")
        monkeypatch.setenv("KEYS", "carol=sk-carol-0123456789, ")
        keys = read_keys(AuthConfig(keys_file=path, keys_env="KEYS"))
        assert keys.tenant("Bearer sk-carol-0123456789") == "carol"
        assert keys.tenant(f"Bearer {self.BOB}") == "bob"

    @pytest.mark.parametrize(
        ("mode", "owner", "told"),
        [
            (0o600, True, False),
            (0o640, True, True),
            (0o604, True, True),
            (0o440, False, False),  # as Kubernetes mounts a secret: root's, for our group
            (0o444, False, True),
        ],
    )
    def test_a_file_that_others_can_read_is_told(
        self, tmp_path, monkeypatch, caplog, mode, owner, told
    ):
        path = tmp_path / "keys.yaml"
        path.write_text(f"alice: {self.ALICE}\n")
        path.chmod(mode)
        found = path.stat()
        monkeypatch.setattr("os.getuid", lambda: found.st_uid + (not owner))
        monkeypatch.setattr("os.getgid", lambda: found.st_gid)
        read_keys(AuthConfig(keys_file=path))
        assert ("can be read by others" in caplog.text) == told

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("", "must hold a key or a list of keys for each tenant"),
            ("alice: []", "there is no key: no one could be served"),
            ("alice: short-key", "a key of tenant alice has 9 characters: it needs at least 16"),
            ("alice: [1234567890123456789]", "the keys of tenant alice must be texts"),
            ("a: sk-0123456789-0123\nb: sk-0123456789-0123", "tenants a and b have the same key"),
            ("a: [sk-0123456789-0123, sk-0123456789-0123]", "tenant a has the same key twice"),
            ("a: sk-0123456789-0123\na: sk-0123456789-0124", "in which each tenant stands once"),
            ("a: [", "is no readable YAML file of keys"),
        ],
    )
    def test_wrong_files_are_refused_without_showing_a_key(self, tmp_path, content, sentence):
        path = tmp_path / "keys.yaml"
        path.write_text(content)
        with pytest.raises(ConfigError, match=sentence) as refused:
            read_keys(AuthConfig(keys_file=path))
        assert "0123" not in str(refused.value)
        assert "short-key" not in str(refused.value)

    def test_an_unset_or_wrong_variable_is_refused(self, monkeypatch):
        monkeypatch.delenv("KEYS", raising=False)
        with pytest.raises(ConfigError, match="KEYS with the API keys is not set"):
            read_keys(AuthConfig(keys_env="KEYS"))
        monkeypatch.setenv("KEYS", "sk-alice-0123456789")
        with pytest.raises(ConfigError, match="must hold tenant=key pairs"):
            read_keys(AuthConfig(keys_env="KEYS"))

    def test_the_time_of_a_refusal_does_not_tell_how_much_of_a_key_is_right(self):
        keys = Keys({"alice": [self.ALICE * 100]})
        near, far = self.ALICE * 99 + "x" * 19, "x" * 1900

        def seconds(key: str) -> float:
            best = 1.0
            for _ in range(300):
                begin = time.perf_counter()
                keys.tenant(f"Bearer {key}")
                best = min(best, time.perf_counter() - begin)
            return best

        assert 0.5 < seconds(near) / seconds(far) < 2.0

    def test_a_key_is_looked_up_at_once_among_a_hundred_thousand(self):
        keys = Keys({f"t{i}": [f"sk-{i:020}"] for i in range(100_000)})
        assert keys.tenant("Bearer sk-00000000000000077777") == "t77777"
        with cpu_limit(2.0):  # comparing with each of them took 20 ms
            for i in range(20_000):
                keys.tenant(f"Bearer sk-{i}-unknown")

    @pytest.mark.parametrize("wrong", ["Bearer \ud800", "Bearer " + "x" * 10**6, "\x00", " "])
    def test_a_senseless_header_is_no_key(self, wrong):
        assert Keys({"alice": [self.ALICE]}).tenant(wrong) is None

    def test_a_change_of_the_file_is_seen_whatever_the_way(self, tmp_path):
        path, changes = tmp_path / "keys.yaml", []

        async def test():
            task = asyncio.create_task(watch_file(path, lambda: changes.append(1), 0.01))
            await asyncio.sleep(0.05)
            for change in (
                lambda: path.write_text("a: 1"),
                lambda: path.write_text("a: 12"),
                path.unlink,
                lambda: path.symlink_to(tmp_path / "one"),
                lambda: ((tmp_path / "two").write_text("x"), (tmp_path / "two").rename(path)),
            ):
                seen = len(changes)
                change()
                async with asyncio.timeout(5):
                    while len(changes) == seen and not (path.is_symlink()):
                        await asyncio.sleep(0.005)
                await asyncio.sleep(0.05)
            assert 4 <= len(changes) <= 8
            task.cancel()

        asyncio.run(test())


class TestLimits:
    def test_a_minutes_worth_may_come_at_once_and_then_refills(self):
        limits = Limits(LimitConfig(requests_per_min=60), {})
        for _ in range(60):
            limits.enter("a", 0.0)
        with pytest.raises(RequestError, match="a may send 60 requests a minute") as refused:
            limits.enter("a", 0.25)
        assert refused.value.retry_after_s == pytest.approx(0.75)
        limits.enter("a", 1.0)
        limits.enter("b", 0.0)  # another tenant's bucket is its own

    def test_less_than_one_a_minute_is_possible(self):
        limits = Limits(LimitConfig(requests_per_min=0.5), {})
        limits.enter("a", 0.0)
        with pytest.raises(RequestError):
            limits.enter("a", 119.0)
        limits.enter("a", 120.0)

    def test_a_place_is_free_again_when_a_request_leaves(self):
        limits = Limits(LimitConfig(), {"a": LimitConfig(max_concurrent=1)})
        limits.enter("a", 0.0)
        with pytest.raises(RequestError, match="a has 1 requests in progress"):
            limits.enter("a", 0.0)
        limits.leave("a")
        limits.enter("a", 0.0)
        for _ in range(100):
            limits.enter("b", 0.0)


def test_unknown_keys_of_lists_and_mappings_name_their_neighbours():
    data = {
        "replicas": [{"name": "a", "url": "http://b", "rates": {"prefil_tokens_per_s": 1}}],
        "tenants": {"alice": {}},
    }
    with pytest.raises(ConfigError, match="did you mean prefill_tokens_per_s"):
        parse_config(data, "here")
