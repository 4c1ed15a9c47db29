"""Prompts are measured in tokens where they are known, in bytes where they are not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from servegym.errors import ConfigError
from servegym.serve.requests.prompt import PrefixConfig, PromptReader, chat_text
from servegym.serve.router.errors import RequestError
from servegym.serve.router.forms import CHAT, COMPLETION
from servegym.serve.router.request import read_request


def test_token_ids_are_counted_exactly():
    prompt = PromptReader(PrefixConfig(block_tokens=4)).read(list(range(10)))
    assert (prompt.tokens, prompt.block_tokens, len(prompt.keys)) == (10, 4, 2)


def test_texts_are_guessed_and_the_guess_learns():
    reader = PromptReader(PrefixConfig(block_tokens=16, bytes_per_token=4))
    text = "x" * 1000
    prompt = reader.read(text)
    assert (prompt.tokens, len(prompt.keys)) == (250, 15)
    for _ in range(300):
        reader.learn(reader.read(text), 500)
    again = reader.read(text)
    assert again.tokens == pytest.approx(500, rel=0.01)
    assert again.keys.tolist() == prompt.keys.tolist()  # blocks stay what they are
    assert again.block_tokens == pytest.approx(32, rel=0.01)
    reader.learn(prompt._replace(num_bytes=10**9), 1)
    assert reader.read(text).tokens > 400  # nonsense moves it little


def test_lone_surrogates_are_no_trouble():
    assert PromptReader(PrefixConfig()).read(json.loads('"\\ud800 x"')).tokens == 1


def test_a_tokenizer_needs_its_package_or_file(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizers package|is no tokenizer.json"):
        PromptReader(PrefixConfig(tokenizer=tmp_path / "tokenizer.json"))


def test_a_tokenizer_gives_token_ids(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    reader = PromptReader(PrefixConfig(tokenizer=tmp_path / "tokenizer.json", block_tokens=2))
    assert reader.read("a b a b a").tokens == 5
    assert reader.read("a b a").keys.tolist() == reader.read([0, 1, 0]).keys.tolist()


def test_a_later_turn_begins_as_the_earlier_one():
    first = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    more = [*first, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "so"}]
    assert chat_text(more).startswith(chat_text(first))
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat_text(more, tools).startswith(chat_text(first, tools))
    assert chat_text(first) != chat_text([{**first[0], "role": "user"}, first[1]])


def picture(name: str, num_bytes: int = 300_000):
    url = "data:image/png;base64," + (name * num_bytes)[:num_bytes]
    return {"type": "image_url", "image_url": {"url": url}}


def talk(*parts):
    return chat_text([{"role": "user", "content": [*parts, {"type": "text", "text": "see"}]}])


def test_an_image_counts_by_the_piece_and_not_by_its_bytes():
    reader = PromptReader(PrefixConfig(media_tokens=1000))
    text = reader.read(talk())
    one, two = reader.read(talk(picture("A"))), reader.read(talk(picture("A", 90), picture("B")))
    assert (one.tokens, two.tokens) == (text.tokens + 1000, text.tokens + 2000)
    assert (one.num_media, two.num_media) == (1, 2)
    assert one.num_bytes == two.num_bytes == text.num_bytes
    for other in ({"type": "input_audio", "input_audio": {"data": "A" * 10**6}}, {}, 7, None):
        assert reader.read(talk(other)).tokens == text.tokens + 1000
    assert "see" in talk({"type": "refusal", "refusal": "no"}, "see")
    chat_text([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, 7])


def test_images_do_not_shift_the_estimate_of_texts():
    reader = PromptReader(PrefixConfig(media_tokens=1000, bytes_per_token=4))
    long = "x" * 4000
    before = reader.read(long).tokens
    for _ in range(100):
        prompt = reader.read(talk(picture("A")))
        reader.learn(prompt, round(prompt.tokens - prompt.media_tokens) + 256)
    assert reader.read(long).tokens == before
    assert reader.read(talk(picture("B"))).media_tokens == pytest.approx(256, rel=0.02)
    reader.learn(prompt, 10**400)
    assert reader.read(talk(picture("B"))).tokens < 20_000


@pytest.mark.parametrize("tokenized", [False, True])
def test_equal_images_are_equal_prefixes_of_their_size(tokenized):
    reader = PromptReader(PrefixConfig(block_tokens=16, media_tokens=480))
    if tokenized:
        reader._tokenizer = ByCharacter()
    same = reader.read(talk(picture("A"))).keys
    longer = reader.read(talk(picture("A")) + " and tell me more, much more, of it all").keys
    other = reader.read(talk(picture("B"))).keys
    assert len(same) >= 480 // 16
    assert longer[: len(same) - 1].tolist() == same[:-1].tolist()
    assert not set(other.tolist()) & set(same[1:].tolist())
    prompt = reader.read(talk(picture("A")))
    assert len(prompt.keys) * prompt.block_tokens == pytest.approx(prompt.tokens, rel=0.1)


class ByCharacter:
    """A tokenizer of characters."""

    def encode(self, sequence, *, add_special_tokens=True):
        return SimpleNamespace(ids=[ord(character) for character in sequence])


def test_a_body_full_of_parts_makes_no_heap():
    prompt = PromptReader(PrefixConfig(media_tokens=100_000)).read(talk(*[{}] * 100_000))
    assert prompt.num_media == 100_000
    assert len(prompt.keys) < 10**6


def test_markers_that_a_client_writes_itself_are_no_trouble():
    for text in ("\x04", "\x04\x05", "\x04" * 10_000, f"\x04{'a' * 32}", f"\x04{'a' * 32}\x05"):
        assert PromptReader(PrefixConfig()).read(text).tokens >= 1


def test_token_ids_of_any_size_are_read():
    assert PromptReader(PrefixConfig(block_tokens=1)).read([2**63, 10**400, -(10**400)]).tokens == 3


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("abc", "abc"),
        (["ab", "c"], "abc"),
        ([1, 2, 3], [1, 2, 3]),
        ([[1, 2], [3]], [1, 2, 3]),
    ],
)
def test_all_forms_of_a_prompt_are_read(prompt, want):
    asked = read_request(json.dumps({"prompt": prompt, "max_tokens": 7}).encode(), COMPLETION)
    found = asked.prompt if isinstance(asked.prompt, str) else list(asked.prompt)
    assert (found, asked.max_tokens, asked.stream) == (want, 7, False)


def test_chats_have_two_names_for_the_limit():
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    for name in ("max_tokens", "max_completion_tokens"):
        asked = read_request(json.dumps({**body, name: 9}).encode(), CHAT)
        assert (asked.max_tokens, asked.stream) == (9, True)
    both = {**body, "max_tokens": 1, "max_completion_tokens": 2}
    assert read_request(json.dumps(both).encode(), CHAT).max_tokens == 2
    with pytest.raises(RequestError, match="tier must be a text"):
        read_request(json.dumps({**body, "tier": 1}).encode(), CHAT, slo_field="tier")
