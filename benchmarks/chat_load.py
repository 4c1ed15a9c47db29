"""Clients that hold conversations: every turn's prompt is all that was said before, and more."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from load_client import Connection, Load, Work

from servegym.serve.engine.content import answer_text, request_digest


class Chat(NamedTuple):
    """What is talked about.

    Attributes:
        num_systems: Beginnings that conversations share.
        system_chars: Of each.
        turn_chars: Least and most characters that a turn adds.
        output_tokens: Least and most tokens of an answer.
        turns: Least and most of a conversation.
        think_s: Least and most seconds between an answer and the next turn.
    """

    num_systems: int = 12
    system_chars: int = 2500
    turn_chars: tuple[int, int] = (300, 3000)
    output_tokens: tuple[int, int] = (50, 150)
    turns: tuple[int, int] = (3, 9)
    think_s: tuple[float, float] = (0.2, 1.0)


class ChatLoad(Load):
    """Clients with one conversation at a time each; see `Load`.

    The same seed gives the same conversations, whatever their texts are called.

    Args:
        urls: Where to.
        chat: What is talked about.
        spread: Whether each turn goes to a url drawn at random; else client `i` keeps to the
            `i`-th, wrapping around.
        seed: Of lengths and pauses.
        salt: Goes into all texts: no cache knows those of another salt.
    """

    def __init__(
        self, urls: Sequence[str], chat: Chat, *, spread: bool, seed: int, salt: str
    ) -> None:
        super().__init__(urls, Work(), seed=seed)
        self._chat = chat
        self._spread = spread
        self._salt = salt

    async def _client(
        self, i: int, stop_s: float, wait_s: float, until: Callable[[], bool] | None
    ) -> None:
        await asyncio.sleep(min(wait_s, 5.0))
        links: dict[int, Connection] = {}  # by url
        rng, number, chat = random.Random(f"{self._seed} {i}"), 0, self._chat
        self.active += 1
        while time.monotonic() < stop_s and not (until and until()):
            number += 1
            system = rng.randrange(chat.num_systems)
            said = f"{self._salt} {system} ".ljust(chat.system_chars, "s")
            said += f"{i} {number} "
            for _ in range(rng.randint(*chat.turns)):
                said += "u" * rng.randint(*chat.turn_chars)
                tokens, think_s = rng.randint(*chat.output_tokens), rng.uniform(*chat.think_s)
                at = rng.randrange(len(self._targets)) if self._spread else i
                link = links.get(at)
                if link is None or not link.open:
                    link = await self._connect(at)
                if link is None or time.monotonic() >= stop_s:
                    break
                links[at] = link
                result = await self.one(link, *self.asked(said, tokens))
                if result.outcome != "ok":
                    link.close()
                    break
                said += answer_text(request_digest(said, None), tokens)
                await asyncio.sleep(think_s)
            else:
                continue
            await asyncio.sleep(0.2)
        self.active -= 1
        for link in links.values():
            link.close()
