"""Carrying a request that two replicas do: what each is asked, and the answer of the first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from servegym.serve.discovery.found import place as host_and_port
from servegym.serve.router.config import DisaggregationConfig
from servegym.serve.router.disaggregation import (
    Params,
    Prefilled,
    PrefillError,
    decode_body,
    pair_body,
    prefill_body,
    read_prefilled,
)
from servegym.serve.router.headers import PREFILLER_HEADER
from servegym.serve.router.placement import Apart, DividedPlacement, Placement, Seat
from servegym.serve.router.upstream import Exchange, Pool, Refusal, UpstreamError, ask

#: Larger bodies are read and written anew in a thread: all streams would wait for it.
_LARGE_BYTES = 64 * 1024
#: An answer of a replica that prefills names all blocks of a prompt; more than this is no answer.
_MAX_ANSWER_BYTES = 8 * 1024 * 1024
_Result = TypeVar("_Result")


class Handover:
    """Speaks with the two replicas of a request.

    Args:
        config: How.
        pool: Returns the connections to a replica, by its url.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        config: DisaggregationConfig,
        pool: Callable[[str], Pool],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._pool = pool
        self._clock = clock
        self._prefilling: set[asyncio.Task[None]] = set()  # the loop itself holds tasks only weakly

    async def part(self, apart: Apart, body: bytes, params: Params) -> tuple[bytes, bytes]:
        """Write what a replica is asked that does a part: the body, and another line of the head.

        Args:
            apart: What it does.
            body: The client's.
            params: Of the prefill, if that is over.
        """
        if apart.step == "prefill":
            return await _off_loop(body, prefill_body, body), b""
        if apart.step == "decode":
            return await _off_loop(body, decode_body, body, params), b""
        if self._config.protocol == "sglang":
            return await _off_loop(body, pair_body, body, apart.url, apart.bootstrap_port), b""
        host, port = self._pool(apart.url).place
        return body, f"{PREFILLER_HEADER}: {host_and_port(host, port)}\r\n".encode()

    def takes_two(self, apart: Apart) -> bool:
        """Whether another replica is to be asked at once."""
        return apart.step == "both" and self._config.protocol == "sglang"

    async def ask_both(
        self,
        asking: Coroutine[Any, Any, Exchange],
        placement: Placement,
        seat: Seat,
        head: bytes,
        body: bytes,
    ) -> Exchange:
        """Ask both, and wait until the answer of the one that decodes has begun.

        Args:
            asking: Asks that one.
            placement: Told when the other has prefilled.
            seat: Where the request is.
            head: For the other.
            body: For the other.

        Raises:
            UpstreamError: If one of them fails; a `PrefillError` if it is the other.
        """
        assert seat.apart is not None
        prefilling = asyncio.create_task(self._prefill(placement, seat.apart, head, body))
        self._prefilling.add(prefilling)
        prefilling.add_done_callback(self._over)
        return await _both(asking, prefilling)

    async def end_prefill(self, exchange: Exchange, seat: Seat) -> Prefilled:
        """Read the answer of a replica that prefills and keeps the KV.

        Raises:
            UpstreamError: If it is none.
        """
        due_s = seat.dispatch_s + self._config.prefill_timeout_s
        return read_prefilled(await _read_whole(exchange, due_s))

    def _over(self, prefilling: asyncio.Task[None]) -> None:
        self._prefilling.discard(prefilling)
        if not prefilling.cancelled():
            prefilling.exception()  # the other replica may have answered nevertheless

    async def _prefill(self, placement: Placement, apart: Apart, head: bytes, body: bytes) -> None:
        timeout_s = self._config.prefill_timeout_s
        due_s = self._clock() + timeout_s
        try:
            exchange = await ask(
                self._pool(apart.url), head, body, first_token_s=timeout_s, patience_s=timeout_s
            )
            try:
                answer = await _read_whole(exchange, due_s)
                answered = exchange.head
                assert answered is not None
                if answered.status != 200:
                    refusal = Refusal(answered.status, answered.fields.pairs, answer)
                    raise UpstreamError(f"status_{answered.status}", refusal)
            finally:
                exchange.close()
        except UpstreamError as error:
            raise PrefillError(error.cause, error.refusal) from error
        cast(DividedPlacement, placement).prefilled_beside()


def only_prefilled(seat: Seat, exchange: Exchange) -> bool:
    """Whether an answer is that of a replica that prefills, and for nobody else."""
    prefills = seat.apart is not None and seat.apart.step == "prefill"
    return prefills and exchange.head is not None and exchange.head.status == 200


async def _off_loop(body: bytes, function: Callable[..., _Result], *args: object) -> _Result:
    """Do something with a body; with a large one in a thread."""
    return function(*args) if len(body) < _LARGE_BYTES else await asyncio.to_thread(function, *args)


async def _read_whole(exchange: Exchange, due_s: float) -> bytes:
    """Return the body of an answer that has begun, once all of it has come.

    Args:
        exchange: With the replica.
        due_s: When it must have come, on the exchange's clock.

    Raises:
        UpstreamError: If it has not, or is too long.
    """
    whole = _Whole(exchange)
    exchange.receiver, exchange.patience.due_s = whole, due_s
    for _, body in exchange.held:
        whole.piece(b"", body)
    exchange.held.clear()
    if exchange.ended:
        whole.ended()
    elif exchange.lost:
        whole.lost()
    return await whole.done


class _Whole:
    """Keeps an answer; see `upstream.Receiver`."""

    def __init__(self, exchange: Exchange) -> None:
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._exchange = exchange
        self._kept = bytearray()

    def repeats(self, data: bytes) -> bool:
        return False

    def piece(self, framed: bytes, body: bytes) -> None:
        self._kept += body
        if len(self._kept) > _MAX_ANSWER_BYTES:
            self._fail("empty")

    def ended(self) -> None:
        if not self.done.done():
            self.done.set_result(bytes(self._kept))

    def lost(self) -> None:
        self._fail("disconnected")

    def expired(self) -> None:
        self._fail("timeout")

    def _fail(self, cause: str) -> None:
        if not self.done.done():
            self.done.set_exception(UpstreamError(cause))


async def _both(asking: Coroutine[Any, Any, Exchange], prefilling: asyncio.Task[None]) -> Exchange:
    """Wait until an answer has begun whose prompt another replica computes meanwhile.

    Args:
        asking: Of the replica that decodes.
        prefilling: Of the other.

    Raises:
        UpstreamError: If one of them fails.
    """
    decoding = asyncio.create_task(asking)
    try:
        await asyncio.wait({decoding, prefilling}, return_when=asyncio.FIRST_COMPLETED)
        if not decoding.done():
            prefilling.result()  # it is over, and good unless this raises
        return await decoding
    except BaseException:
        prefilling.cancel()
        if decoding.done() and not decoding.cancelled() and decoding.exception() is None:
            decoding.result().close()
        decoding.cancel()
        await asyncio.wait({decoding})
        raise
