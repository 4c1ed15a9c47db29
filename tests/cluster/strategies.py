"""Random clusters and episodes, small enough that blocks, slots and budgets run out often."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from servegym.cluster.rank_rules import PrefillTogether
from servegym.cluster.spec import (
    VICTIMS,
    ClusterSpec,
    Episode,
    Faults,
    Link,
    MigrationRules,
    ReplicaType,
    Role,
    TransferRules,
)
from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW, FAULT_UP
from servegym.cluster.tier_rules import KvTier, LoadRule, TierRules
from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)
from servegym.costs.shared import NUM_SHARED_KNOTS, SharedCost
from servegym.costs.speculation import Speculation
from servegym.costs.stages import StageGrids
from servegym.engines import EngineName
from servegym.workloads.table import ANY_END, BY_ITSELF, RequestTable


def random_grid(rng: np.random.Generator) -> CostGrid:
    def knots(num: int, high: float) -> np.ndarray:
        drawn = np.sort(rng.uniform(0, high, num))
        drawn[0] = 0.0  # below the first knot a random slope could lead to negative times
        return drawn + np.arange(num) * 1e-3

    dense = knots(NUM_DENSE_KNOTS, 256)
    chunk, context = knots(NUM_CHUNK_KNOTS, 128), knots(NUM_CONTEXT_KNOTS, 400)
    batch, kv = knots(NUM_BATCH_KNOTS, 16), knots(NUM_KV_KNOTS, 2000)
    return CostGrid(
        cpu_s=float(rng.uniform(0.001, 0.01)),
        dense_tokens=dense,
        dense_s=np.cumsum(rng.uniform(0, 1e-3, NUM_DENSE_KNOTS)),
        prefill_chunk=chunk,
        prefill_context=context,
        prefill_s=rng.uniform(0.2, 1) * 1e-6 * np.outer(chunk, 1 + context),
        decode_batch=batch,
        decode_kv=kv,
        decode_s=np.add.outer(1e-4 * batch, np.cumsum(rng.uniform(0, 1e-3, NUM_KV_KNOTS))),
        mixed_s=np.add.outer(2e-4 * batch, np.cumsum(rng.uniform(0, 2e-3, NUM_KV_KNOTS))),
        empty_tiles_s=float(rng.choice([0.0, 1e-5])),
        eager_s=float(rng.choice([0.0, 0.0, 0.02])),
    )


def with_engine(kind: ReplicaType, engine: EngineName, block_size: int) -> ReplicaType:
    """Give a replica type another engine, with what that needs for requests of 119 tokens."""
    budget = kind.max_num_batched_tokens
    budget = max(budget, block_size) if engine == "sglang" else max(budget, 120)
    kind = replace(kind, engine=engine, max_num_batched_tokens=budget)
    while kind.capacity_tokens(block_size) < 119:
        kind = replace(kind, num_blocks=kind.num_blocks + 1)
    return kind


def random_case(
    seed: int, engines: Sequence[EngineName] = ("vllm",)
) -> tuple[ClusterSpec, Episode]:
    """Draw a cluster and an episode; each replica type has one of the engines."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 2, 4, 16]))
    num_types = int(rng.integers(1, 3))
    seqs = int(rng.choice([1, 2, 4, 12]))
    chunked = bool(rng.random() < 0.85)
    budget = int(max(seqs, rng.choice([4, 16, 64]))) if chunked else 400
    longest = 120
    types = tuple(
        ReplicaType(
            name=f"t{i}",
            grid=random_grid(rng),
            num_blocks=-(-longest // size) + int(rng.integers(0, 1 + 300 // size)),
            max_num_batched_tokens=budget,
            max_num_seqs=seqs,
        )
        for i in range(num_types)
    )
    chosen = np.random.default_rng((seed, 1)).choice(engines, num_types).tolist()
    types = tuple(
        kind if engine == "vllm" else with_engine(kind, engine, size)
        for kind, engine in zip(types, chosen, strict=True)
    )
    spec = ClusterSpec(
        types=types,
        block_size=size,
        prefix_caching=bool(rng.random() < 0.7),
        chunked_prefill=chunked,
        allow_hold=bool(rng.random() < 0.3),
        allow_reject=bool(rng.random() < 0.3),
        hold_s=float(rng.uniform(0.01, 0.5)),
        metrics_interval_s=float(rng.choice([0.0, 0.0371])),
        noise_sigma=float(rng.choice([0.0, 0.3])),
        noise_period_steps=int(rng.integers(1, 6)),
    )
    n = int(rng.integers(1, 60))
    gaps = rng.exponential(rng.choice([0.001, 0.02, 0.2]), n) * (rng.random(n) < 0.9)
    prompt = rng.integers(1, 70, n)
    output = rng.integers(1, 50, n) * (rng.random(n) < 0.9) + 1
    counts = rng.integers(0, 4, n)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    keys, ends = [], []
    for c in counts:
        key, end = 0, 0
        for _ in range(c):
            key = key * 7 + int(rng.integers(1, 4))
            end += [8, 16, 40][key % 3]
            keys.append(key)
            ends.append(end)
    table = RequestTable.build(
        np.cumsum(gaps),
        prompt,
        output,
        predicted_output_tokens=output * np.exp(0.3 * rng.standard_normal(n)) + 1,
        prefix_offsets=offsets,
        prefix_keys=np.array(keys, np.int64),
        prefix_ends=np.array(ends, np.int32),
    )
    replicas = int(rng.integers(1, 5))
    rows = []
    for r in range(replicas):
        t = 0.0
        for _ in range(int(rng.integers(0, 3))):
            t += rng.exponential(0.5)
            if rng.random() < 0.5:
                rows.append((t, r, FAULT_SLOW, rng.uniform(0.2, 2.0)))
            else:
                rows.append((t, r, FAULT_DOWN, 0.0))
                t += rng.exponential(0.3)
                rows.append((t, r, FAULT_UP, 0.0))
    rows.sort()
    faults = Faults(
        np.array([x[0] for x in rows], float),
        np.array([x[1] for x in rows], np.int16),
        np.array([x[2] for x in rows], np.int8),
        np.array([x[3] for x in rows], float),
    )
    episode = Episode(
        table,
        rng.integers(0, num_types, replicas).astype(np.int16),
        rng.uniform(0.5, 2.0, replicas),
        faults,
        int(rng.integers(1 << 60)),
    )
    return spec, episode


def long_answers(seed: int, engine: EngineName) -> tuple[ClusterSpec, Episode]:
    """Draw an episode whose requests grow to many times what they were when admitted."""
    spec, episode = random_case(seed, (engine,))
    rng = np.random.default_rng((seed, 2))
    n = len(episode.table)
    prompt, output = rng.integers(1, 20, n), rng.integers(100, 600, n)
    table = replace(
        episode.table,
        prompt_tokens=prompt.astype(np.int32),
        output_tokens=output.astype(np.int32),
    )
    types = []
    for kind in spec.types:
        kind = replace(kind, max_num_seqs=12, max_num_batched_tokens=64)
        blocks = -(-620 // spec.block_size) + int(rng.integers(2, 600 // spec.block_size + 3))
        types.append(replace(kind, num_blocks=blocks))
    return replace(spec, types=tuple(types)), replace(episode, table=table)


def choose(request: int, visit: int, allowed: list[bool]) -> int:
    """Pick an allowed action from the request and how often it was decided, nothing else."""
    return _choose(request, visit, tuple(allowed))


@functools.cache
def _choose(request: int, visit: int, allowed: tuple[bool, ...]) -> int:
    rng = np.random.default_rng((request, visit))
    hold = len(allowed) - 2
    options = [r for r, ok in enumerate(allowed[:hold]) if ok]
    if allowed[hold] and visit < 3:
        options.append(hold)
    if allowed[hold + 1] and rng.random() < 0.2:
        options.append(hold + 1)
    return int(options[rng.integers(len(options))])


def with_followers(spec: ClusterSpec, episode: Episode, seed: int) -> tuple[ClusterSpec, Episode]:
    """Let about half of the requests wait: for the end of an earlier one, or of any."""
    rng = np.random.default_rng((seed, 3))
    n = len(episode.table)
    after = (rng.random(n) * np.arange(n)).astype(np.int32)
    after[rng.random(n) < 0.4] = BY_ITSELF
    after[rng.random(n) < 0.2] = ANY_END
    after[0] = BY_ITSELF
    delay_s = rng.choice([0.0, 0.01, 0.1], n) * np.where(rng.random(n) < 0.5, 1, rng.random(n))
    return spec, replace(episode, table=replace(episode.table, after=after, delay_s=delay_s))


def with_ranks(spec: ClusterSpec, episode: Episode, seed: int) -> tuple[ClusterSpec, Episode]:
    """Let replicas of some types step together; these slow down, but do not fail."""
    rng = np.random.default_rng((seed, 4))
    types = []
    for i, kind in enumerate(spec.types):
        if kind.engine != "vllm-priority" and (i == 0 or rng.random() < 0.5):
            kind = replace(kind, shared=random_shared(rng, int(rng.integers(1, 4))))
            if kind.engine == "trtllm" and seed % 2:
                rule = PrefillTogether(int(rng.integers(1, 9)), int(rng.integers(0, 4)))
                kind = replace(kind, together=rule)
        types.append(kind)
    drawn = rng.integers(0, len(types), rng.integers(1, 4)).tolist()
    return _side_by_side(replace(spec, types=tuple(types)), episode, rng, drawn)


def with_roles_of_ranks(
    spec: ClusterSpec, episode: Episode, seed: int
) -> tuple[ClusterSpec, Episode]:
    """Let some replicas only prefill and others only decode, and some of either step together."""
    spec, episode = with_roles(spec, episode, seed)
    rng = np.random.default_rng((seed, 8))
    types = tuple(
        replace(kind, shared=random_shared(rng, int(rng.integers(1, 4))))
        if i == seed % 2 or rng.random() < 0.5
        else kind
        for i, kind in enumerate(spec.types)
    )
    drawn = rng.permutation(episode.type_idx).tolist()
    return _side_by_side(replace(spec, types=types), episode, rng, drawn)


def _side_by_side(
    spec: ClusterSpec, episode: Episode, rng: np.random.Generator, drawn: list[int]
) -> tuple[ClusterSpec, Episode]:
    """Take a replica, or a group of ranks, of each type drawn; ranks do not fail."""
    type_idx = np.array(
        [t for t in drawn for _ in range(max(1, spec.types[t].num_ranks))], np.int16
    )
    num_ranks = np.array([kind.num_ranks for kind in spec.types])[type_idx]
    faults = episode.faults
    keep = faults.replica < len(type_idx)
    keep &= (faults.kind == FAULT_SLOW) | (num_ranks[faults.replica % len(type_idx)] == 0)
    episode = replace(
        episode,
        type_idx=type_idx,
        speed=rng.uniform(0.5, 2.0, len(type_idx)),
        faults=Faults(
            faults.time_s[keep], faults.replica[keep], faults.kind[keep], faults.value[keep]
        ),
    )
    return spec, episode


def with_stages(spec: ClusterSpec, episode: Episode, seed: int) -> tuple[ClusterSpec, Episode]:
    """Split the layers of some types, the first at least, over the stages of a pipeline."""
    rng = np.random.default_rng((seed, 10))
    types = []
    for i, kind in enumerate(spec.types):
        if kind.engine in ("vllm", "trtllm") and (i == 0 or rng.random() < 0.5):
            stages = tuple(random_grid(rng) for _ in range(int(rng.integers(1, 5))))
            handover_s = np.cumsum(rng.uniform(0, 1e-3, NUM_DENSE_KNOTS)) * rng.integers(0, 2)
            kind = replace(kind, pipeline=StageGrids(stages, handover_s))
        types.append(kind)
    return replace(spec, types=tuple(types)), episode


def with_drafts(spec: ClusterSpec, episode: Episode, seed: int) -> tuple[ClusterSpec, Episode]:
    """Let requests of some types, the first at least, have drafts; blocks and budgets are short."""
    rng = np.random.default_rng((seed, 11))
    types = []
    for i, kind in enumerate(spec.types):
        if kind.engine in ("vllm", "trtllm") and (i == 0 or rng.random() < 0.5):
            rates = np.sort(rng.uniform(0, 1, int(rng.integers(1, 5))))[::-1]
            draft_s = np.cumsum(rng.uniform(0, 1e-3, NUM_BATCH_KNOTS))
            drafts = Speculation(tuple(rates.tolist()), random_grid(rng), draft_s)
            budget = max(kind.max_num_batched_tokens, 1 + drafts.num_tokens)
            kind = replace(kind, speculation=drafts, max_num_batched_tokens=budget)
            while kind.capacity_tokens(spec.block_size) < 120:
                kind = replace(kind, num_blocks=kind.num_blocks + 1)
        types.append(kind)
    return replace(spec, types=tuple(types)), episode


def random_shared(rng: np.random.Generator, num_ranks: int) -> SharedCost:
    """Draw what ranks do together: knots within what a step of small requests has."""

    def times_s(most_s: float) -> np.ndarray:
        return np.cumsum(rng.uniform(0, most_s, NUM_SHARED_KNOTS))

    return SharedCost(
        num_ranks,
        tokens=1.0 + np.cumsum(rng.uniform(0.2, 4.0, NUM_SHARED_KNOTS)),
        experts_s=1e-3 + times_s(1e-3),
        skewed_experts_s=1e-3 + times_s(2e-3),
        exchange_s=5e-3 + times_s(1e-3),
        largest_graph=int(rng.choice([0, 3, 16, 400])),
    )


def with_conversations(
    spec: ClusterSpec, episode: Episode, seed: int
) -> tuple[ClusterSpec, Episode]:
    """Let those who wait for one request go on from its text, and its blocks be retained."""
    spec, episode = with_followers(spec, episode, seed)
    rng = np.random.default_rng((seed, 5))
    table = episode.table
    n = len(table)
    prompt = table.prompt_tokens.copy()
    texts: list[list[tuple[int, int]]] = []
    for i, turn in enumerate(table.after.tolist()):
        said = list(texts[turn]) if turn >= 0 else []
        if said and rng.random() < 0.3:  # the context is rewritten behind one of its parts
            said = said[: int(rng.integers(len(said)))]
        begin = said[-1][1] if said else 0
        prompt[i] = min(69, begin + int(rng.integers(1, 12))) if turn >= 0 else prompt[i]
        end = int(prompt[i] + table.output_tokens[i])
        texts.append(said + ([(1000 + i, end)] if end > begin else []))
    table = replace(
        table,
        prompt_tokens=prompt,
        prefix_offsets=np.concatenate(([0], np.cumsum([len(text) for text in texts]))).astype(
            table.prefix_offsets.dtype
        ),
        prefix_keys=np.array([key for text in texts for key, _ in text], np.int64),
        prefix_ends=np.array([end for text in texts for _, end in text], np.int32),
    )
    assert len(texts) == n
    spec = replace(
        spec, prefix_caching=True, retain_kv_s=float(rng.choice([0.02, 0.1, 0.5, 5.0, 1e9]))
    )
    return spec, replace(episode, table=table)


def with_roles(spec: ClusterSpec, episode: Episode, seed: int) -> tuple[ClusterSpec, Episode]:
    """Let some replicas only prefill and others only decode; leases, memory and links are short."""
    rng = np.random.default_rng((seed, 6))
    roles: list[Role] = ["prefill", *rng.choice(["decode", "mixed", "prefill"], 3).tolist()]
    roles[1] = "decode" if rng.random() < 0.8 else "mixed"
    types = tuple(
        replace(
            spec.types[i % len(spec.types)],
            role=role,
            link=Link(
                bytes_per_s=float(rng.choice([1e3, 1e5, np.inf])),
                latency_s=float(rng.choice([0.0, 0.01, 0.2])),
                piece_s=float(rng.choice([0.0, 1e-3])),
            ),
        )
        for i, role in enumerate(roles)
    )
    type_idx = np.concatenate(([0, 1], rng.integers(0, len(types), rng.integers(0, 4))))
    faults = episode.faults
    keep = faults.replica < len(type_idx)
    episode = replace(
        episode,
        type_idx=rng.permutation(type_idx).astype(np.int16),
        speed=rng.uniform(0.5, 2.0, len(type_idx)),
        faults=Faults(
            faults.time_s[keep], faults.replica[keep], faults.kind[keep], faults.value[keep]
        ),
    )
    rules = TransferRules(
        kv_token_bytes=float(rng.choice([0.0, 1.0, 10.0])),
        kv_block_pieces=int(rng.integers(0, 4)),
        reservation="source" if rng.random() < 0.5 else "destination",
        lease_s=float(rng.choice([0.05, 0.3, 5.0, 480.0])),
        ahead_tokens=int(rng.choice([0, 5, 512])),
        max_num_held=int(rng.choice([1, 4, 256])),
    )
    return replace(spec, types=types, transfers=rules), episode


def over_slow_links(spec: ClusterSpec, rng: np.random.Generator) -> tuple[ReplicaType, ...]:
    """Return the types of a cluster with links at which much waits."""
    return tuple(
        replace(
            kind,
            link=Link(
                bytes_per_s=float(rng.choice([1e2, 1e3, 1e5, np.inf])),
                latency_s=float(rng.choice([0.0, 0.01, 0.2])),
                piece_s=float(rng.choice([0.0, 1e-3])),
            ),
        )
        for kind in spec.types
    )


def with_migration(spec: ClusterSpec, episode: Episode, seed: int) -> tuple[ClusterSpec, Episode]:
    """Let requests move between replicas often, over slow links and in few stages."""
    rng = np.random.default_rng((seed, 7))
    types = over_slow_links(spec, rng)
    type_idx = np.concatenate((episode.type_idx, rng.integers(0, len(types), 2)))
    episode = replace(
        episode,
        type_idx=type_idx.astype(np.int16),
        speed=rng.uniform(0.5, 2.0, len(type_idx)),
    )
    transfers = TransferRules(
        kv_token_bytes=float(rng.choice([0.0, 1.0, 10.0])),
        kv_block_pieces=int(rng.integers(0, 4)),
        max_num_held=int(rng.choice([1, 4, 256])),
    )
    migration = MigrationRules(
        interval_s=float(rng.choice([0.005, 0.02, 0.1])),
        rule=("freeness", "freeness", "queues")[rng.integers(3)],
        victim=VICTIMS[rng.integers(len(VICTIMS))],
        source_below=float(rng.choice([3.0, 10.0, 1e9])),
        target_above=float(rng.choice([-1e9, 0.0, 3.0])),
        queue_gap=int(rng.integers(1, 4)),
        last_stage_blocks=int(rng.choice([1, 2, 16])),
        max_stages=int(rng.integers(1, 5)),
    )
    return replace(spec, types=types, transfers=transfers, migration=migration), episode


def with_tiers(spec: ClusterSpec, episode: Episode, seed: int) -> tuple[ClusterSpec, Episode]:
    """Put small and slow tiers behind KV blocks, which are few."""
    rng = np.random.default_rng((seed, 7))

    def tier() -> KvTier:
        read, write = rng.choice([1e3, 1e5, np.inf], 2).tolist()
        return KvTier(int(rng.choice([1, 4, 30, 400])), read, write, rng.choice([0.0, 0.01, 0.2]))

    def perhaps() -> KvTier | None:
        return tier() if rng.random() < 0.6 else None

    types = tuple(
        replace(
            kind,
            num_blocks=-(-120 // spec.block_size) + int(rng.integers(0, 4)),
            host_kv=perhaps(),
            disk_kv=perhaps(),
        )
        for kind in spec.types
    )
    alone = all(t.host_kv is None and t.disk_kv is None for t in types)
    rules: list[LoadRule] = ["always", "faster"]
    tiers = TierRules(
        load=rules[int(rng.integers(2))],
        interference=float(rng.choice([1.0, 2.5])),
        store=tier() if alone else perhaps(),
        store_bytes_per_s=float(rng.choice([3e3, 1e6, np.inf])),
    )
    transfers = replace(spec.transfers, kv_token_bytes=float(rng.choice([1.0, 10.0])))
    spec = replace(spec, types=types, tiers=tiers, transfers=transfers, prefix_caching=True)
    return spec, episode


def with_fetching(spec: ClusterSpec, episode: Episode, seed: int) -> tuple[ClusterSpec, Episode]:
    """Let replicas fetch prefixes from each other, over slow links."""
    rng = np.random.default_rng((seed, 9))
    types = over_slow_links(spec, rng)
    transfers = replace(
        spec.transfers,
        kv_token_bytes=float(rng.choice([1.0, 10.0])),
        kv_block_pieces=int(rng.integers(0, 4)),
        max_num_held=int(rng.choice([1, 4, 256])),
    )
    tiers = replace(spec.tiers, balancing_threshold=float(rng.choice([1.0, 1.5, 3.0])))
    spec = replace(spec, types=types, tiers=tiers, transfers=transfers, prefix_caching=True)
    return spec, episode
