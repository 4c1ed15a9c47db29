"""What follows what: by session, by prompt, each tenant alone, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.serve.requests.prompt import PrefixConfig, Prompt, PromptReader, chat_text
from servegym.serve.requests.recent_ends import RecentEnds

READER = PromptReader(PrefixConfig())  # blocks of 16 tokens or 64 bytes


class Fleet:
    """Requests of the same clock, by their names."""

    def __init__(self, max_ends: int = 100) -> None:
        self.ends = RecentEnds(max_ends)
        self.marks = {}

    def arrive(self, key, prompt, now_s, tenant="t", session=None):
        """Return whom it follows, after how long, and how that is known."""
        measured = READER.read(prompt) if not isinstance(prompt, Prompt) else prompt
        self.marks[key], found = self.ends.arrive(measured, tenant, session, now_s)
        return None if found is None else tuple(found)

    def end(self, key, now_s):
        if self.marks[key] is not None:
            self.ends.add(self.marks[key], key, now_s)


def chat(*texts):
    roles = ("user", "assistant")
    return chat_text([{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)])


LONG = "How do I sort a list of dictionaries in Python by a key they all have in common?"


class TestSessions:
    def test_the_next_of_a_session_follows_its_last_answer(self):
        fleet = Fleet()
        assert fleet.arrive("a", "x", 0.0, session="s") is None
        fleet.end("a", 2.0)
        assert fleet.arrive("b", "y", 5.0, session="s") == ("a", 3.0, "session")
        fleet.end("b", 6.0)
        assert fleet.arrive("c", "z", 6.5, session="s") == ("b", 0.5, "session")

    def test_of_requests_at_once_that_counts_which_was_answered_last(self):
        fleet = Fleet()
        for key in "abc":
            fleet.arrive(key, "x", 0.0, session="s")
        fleet.end("b", 1.0)
        fleet.end("a", 2.0)
        assert fleet.arrive("d", "x", 3.0, session="s") == ("a", 1.0, "session")  # c is on its way
        fleet.end("c", 4.0)
        assert fleet.arrive("e", "x", 4.25, session="s") == ("c", 0.25, "session")

    def test_equal_names_of_two_tenants_are_two_sessions(self):
        fleet = Fleet()
        fleet.arrive("a", "x", 0.0, tenant="alice", session="s")
        fleet.end("a", 1.0)
        assert fleet.arrive("b", "x", 2.0, tenant="bob", session="s") is None

    def test_who_names_a_session_is_not_guessed_about(self):
        fleet = Fleet()
        fleet.arrive("a", chat(LONG), 0.0)
        fleet.end("a", 1.0)
        assert fleet.arrive("b", chat(LONG, "So.", "And?"), 2.0, session="new") is None

    def test_long_names_are_told_apart(self):
        fleet = Fleet()
        fleet.arrive("a", "x", 0.0, session="s" * 5000 + "1")
        fleet.end("a", 1.0)
        assert fleet.arrive("b", "x", 2.0, session="s" * 5000 + "2") is None
        assert fleet.arrive("c", "x", 2.0, session="s" * 5000 + "1") == ("a", 1.0, "session")


class TestPrompts:
    def test_a_later_turn_follows_the_one_before(self):
        fleet = Fleet()
        assert fleet.arrive("a", chat(LONG), 0.0) is None
        fleet.end("a", 2.0)
        assert fleet.arrive("b", chat(LONG, "So.", "And?"), 3.0) == ("a", 1.0, "prefix")
        fleet.end("b", 4.0)
        third = chat(LONG, "So.", "And?", "Thus.", "Thanks.")
        assert fleet.arrive("c", third, 6.0) == ("b", 2.0, "prefix")

    def test_tokens_are_known_as_texts_are(self):
        fleet = Fleet()
        fleet.arrive("a", list(range(20)), 0.0)
        fleet.end("a", 1.0)
        assert fleet.arrive("b", list(range(21)), 2.0) == ("a", 1.0, "prefix")
        assert fleet.arrive("c", [*range(19), 7, 8], 2.0) is None  # the block is the same

    def test_one_in_progress_is_followed_by_none(self):
        fleet = Fleet()
        fleet.arrive("a", chat(LONG), 0.0)
        assert fleet.arrive("b", chat(LONG, "So.", "And?"), 3.0) is None

    def test_the_same_prompt_again_follows_none(self):
        fleet = Fleet()
        fleet.arrive("a", chat(LONG), 0.0)
        fleet.end("a", 1.0)
        assert fleet.arrive("b", chat(LONG), 2.0) is None

    def test_of_equal_prompts_the_latest_answer_counts(self):
        fleet = Fleet()
        for key, end_s in (("a", 1.0), ("b", 2.0)):
            fleet.arrive(key, chat(LONG), 0.0)
            fleet.end(key, end_s)
        assert len(fleet.ends) == 1
        assert fleet.arrive("c", chat(LONG, "So.", "And?"), 3.0) == ("b", 1.0, "prefix")

    def test_a_shared_beginning_alone_is_no_sign(self):
        fleet = Fleet()
        system = "You are a helpful assistant who answers in rhymes, and briefly, too. " * 3
        fleet.arrive("a", chat(system + "Why?"), 0.0)
        fleet.end("a", 1.0)
        assert fleet.arrive("b", chat(system + "Who?"), 2.0) is None
        fleet.end("b", 3.0)
        # both end with the same block, and are told apart by the bytes after it
        assert fleet.arrive("c", chat(system + "Why?", "I.", "So?"), 4.0) == ("a", 3.0, "prefix")
        assert fleet.arrive("d", chat(system + "Who?", "I.", "So?"), 4.0) == ("b", 1.0, "prefix")

    def test_tenants_never_mix(self):
        fleet = Fleet()
        fleet.arrive("a", chat(LONG), 0.0, tenant="alice")
        fleet.end("a", 1.0)
        assert fleet.arrive("b", chat(LONG, "So.", "And?"), 2.0, tenant="bob") is None

    def test_tenants_whose_names_collide_do_not_mix_either(self, monkeypatch):
        monkeypatch.setattr("servegym.serve.requests.recent_ends.hash", lambda _: 7, raising=False)
        fleet = Fleet()
        fleet.arrive("a", chat(LONG), 0.0, tenant="alice")
        fleet.end("a", 1.0)
        assert fleet.arrive("b", chat(LONG, "So.", "And?"), 2.0, tenant="bob") is None
        assert fleet.arrive("c", chat(LONG, "So.", "And?"), 2.0, tenant="alice") is not None

    def test_less_than_a_block_is_too_little_to_guess_by(self):
        fleet = Fleet()
        fleet.arrive("a", chat("Hi"), 0.0)
        fleet.end("a", 1.0)
        assert fleet.arrive("b", chat("Hi", "Hello!", LONG), 2.0) is None

    def test_a_prompt_without_content_is_known_by_whole_blocks(self):
        fleet = Fleet()
        keys = np.arange(5, dtype=np.uint64)
        fleet.arrive("a", Prompt(40, keys[:2], 16), 0.0)
        fleet.end("a", 1.0)
        assert fleet.arrive("b", Prompt(90, keys, 16), 2.0) == ("a", 1.0, "prefix")
        assert fleet.arrive("c", Prompt(45, keys[:2], 16), 2.0) is None

    @pytest.mark.parametrize(("blocks", "found"), [(1023, True), (1024, False)])
    def test_a_turn_that_adds_very_much_is_not_looked_for(self, blocks, found):
        fleet = Fleet()
        first = list(range(16))
        fleet.arrive("a", first, 0.0)
        fleet.end("a", 1.0)
        later = fleet.arrive("b", [*first, *range(16 * blocks)], 2.0)
        assert (later is not None) == found


class TestMemory:
    def test_the_oldest_are_forgotten(self):
        fleet = Fleet(max_ends=3)
        for i in range(5):
            fleet.arrive(str(i), "x", float(i), session=str(i))
            fleet.end(str(i), float(i))
        assert len(fleet.ends) == 3
        known = [fleet.arrive("n", "x", 9.0, session=str(i)) is not None for i in range(5)]
        assert known == [False, False, True, True, True]

    def test_an_end_makes_its_session_the_youngest(self):
        fleet = Fleet(max_ends=2)
        for i, session in enumerate("aba" + "c"):
            fleet.arrive(str(i), "x", float(i), session=session)
            fleet.end(str(i), float(i))
        assert fleet.arrive("n", "x", 9.0, session="b") is None
        assert fleet.arrive("n", "x", 9.0, session="a") == ("2", 7.0, "session")

    def test_prompts_alike_do_not_pile_up(self):
        fleet = Fleet(max_ends=50)
        for i in range(40):  # same block, other tails
            fleet.arrive(str(i), [*range(16), i], float(i))
            fleet.end(str(i), float(i))
        assert len(fleet.ends) == 8
        assert fleet.arrive("n", [*range(16), 39, 1], 40.0) == ("39", 1.0, "prefix")
        assert fleet.arrive("n", [*range(16), 3, 1], 40.0) is None
