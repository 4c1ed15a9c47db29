"""Who keeps which KV for whom: `kv_transfer_params` of the replicas of one process.

The fields are those that vLLM's NIXL connector answers with (vllm-project/vllm,
vllm/distributed/kv_transfer/kv_connector/v1, `request_finished` of the connector's scheduler).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from servegym.errors import WorkloadError
from servegym.serve.engine.roles import Kept

#: Port of vLLM's side channel, which nobody asks here.
_SIDE_CHANNEL_PORT = 5600


class NoKvError(WorkloadError):
    """Raised when KV that is to be fetched is not kept: the fault of no client."""


class Handovers:
    """The KV that is kept, until it is fetched or its lease is over.

    Args:
        lease_s: How long it is kept for who has not begun to fetch it, real seconds.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._kept: dict[tuple[str, str], tuple[Kept, asyncio.TimerHandle]] = {}

    def keep(self, name: str, kept: Kept, num_blocks: int) -> dict[str, Any]:
        """Keep KV for whoever names it; return how.

        Args:
            name: Of its request.
            kept: It.
            num_blocks: That it has.
        """
        engine = f"replica-{kept.source}"
        place = engine, name
        loop = asyncio.get_running_loop()
        self._kept[place] = kept, loop.call_later(self._lease_s, self._expire, place)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": engine,
            "remote_request_id": name,
            "remote_block_ids": list(range(num_blocks)),
            "remote_host": "127.0.0.1",
            "remote_port": _SIDE_CHANNEL_PORT,
        }

    def take(self, params: Mapping[str, Any], prompt_tokens: int) -> Kept:
        """Return KV that is to be fetched, which nobody else can then.

        Args:
            params: As `keep` has returned them.
            prompt_tokens: Of the request that wants it.

        Raises:
            NoKvError: If it is not kept.
            WorkloadError: If it is not that of such a prompt.
        """
        place = str(params.get("remote_engine_id")), str(params.get("remote_request_id"))
        found = self._kept.pop(place, None)
        if found is None:
            raise NoKvError(
                f"{place[0]} keeps no KV of {place[1]}: it was fetched, or its lease is over"
            )
        kept, lease = found
        lease.cancel()
        if kept.prompt_tokens != prompt_tokens:
            kept.release(0.0)
            raise WorkloadError(
                f"the KV of {place[1]} is of {kept.prompt_tokens} tokens, the prompt has "
                f"{prompt_tokens}: send the same prompt to both replicas"
            )
        return kept

    def lose(self, source: int) -> None:
        """A replica has failed: what it kept is lost."""
        for place, (kept, lease) in list(self._kept.items()):
            if kept.source == source:
                lease.cancel()
                del self._kept[place]

    def stop(self) -> None:
        """Watch over no lease any more."""
        for _, lease in self._kept.values():
            lease.cancel()

    def _expire(self, place: tuple[str, str]) -> None:
        self._kept.pop(place)[0].release(0.0)
