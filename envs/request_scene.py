"""What is to be seen of environments that play requests."""

from __future__ import annotations

import numpy as np

from servegym.cluster.simulator import Simulator
from servegym.cluster.state import (
    ADMIT,
    DECODE_ONLY,
    DISK,
    DROP,
    HOST,
    KEEP,
    LANDED,
    LEAVE,
    MIGRATE,
    OFFLOAD,
    PLACE,
    PREFILL_ONLY,
    QUEUED,
    RETAIN,
    RUNNING,
    STORE,
    TRANSFERRING,
)
from servegym.envs.scene import Row, Scene, progress, share_ended
from servegym.policy.contract import KV_CACHE_USAGE, OUTSTANDING_PROMPT_TOKENS, UP
from servegym.scenario import Scenario
from servegym.typing import FloatArray, IntArray

#: Rows of requests in the picture of an engine, at most.
_MOST_REQUESTS = 24


def _of(simulator: Simulator, env: int, replica: int, status: int) -> IntArray:
    """Requests of a replica with a status, by arrival."""
    q = simulator.state.request[env][: simulator.state.env[env]["num_requests"]]
    return np.flatnonzero((q["status"] == status) & (q["replica"] == replica))


def _classes(simulator: Simulator, env: int, requests: IntArray) -> tuple[int, ...]:
    return tuple(simulator.state.request[env]["slo_class"][requests].tolist())


def dispatch_deed(simulator: Simulator, env: int, action: int, num_replicas: int) -> str:
    """Say what an action does with the request that is to be dispatched."""
    request = int(simulator.state.env[env]["deciding"])
    if action < num_replicas:
        return f"request {request} went to replica {action}"
    holds = action == num_replicas and bool(simulator.params.allow_hold)
    return f"request {request} was {'held' if holds else 'rejected'}"


def place_deed(simulator: Simulator, env: int, replica: int) -> str:
    """Say where the request that is to be placed decodes."""
    request = int(simulator.state.env[env]["deciding"])
    return f"request {request} will decode on replica {replica}"


def move_deed(pair: int, num_replicas: int) -> str:
    """Say what the controller does."""
    if pair == num_replicas**2:
        return "nobody moved"
    source, target = divmod(pair, num_replicas)
    return f"replica {source} gave a request to replica {target}"


#: In words what becomes of the KV of a turn.
_DEEDS = {DROP: "dropped", LEAVE: "left", OFFLOAD: "offloaded"}


def retain_deed(simulator: Simulator, env: int, answer: int, keep_s: FloatArray) -> str:
    """Say what becomes of the KV of a turn; behind the other answers are times to keep it for."""
    turn = int(simulator.state.env[env]["deciding"])
    deed = _DEEDS[answer] if answer < KEEP else f"kept for {keep_s[answer - KEEP]:g} s"
    return f"the KV of request {turn} was {deed}"


def pick_deed(simulator: Simulator, env: int, ids: IntArray, row: int) -> str:
    """Say whom an engine admits or preempts; `ids` has the request of each row."""
    did = "admitted" if simulator.state.env[env]["decision"] == ADMIT else "preempted"
    return f"{did} {'nobody' if row == len(ids) else f'request {ids[row]}'}"


def _legend(scenario: Scenario) -> tuple[tuple[str, int], ...]:
    """Name the colours of the SLO classes, if there are several."""
    classes = scenario.spec.slo_classes
    return tuple((c.name, i) for i, c in enumerate(classes)) if len(classes) > 1 else ()


def dispatch_scene(scenario: Scenario, simulator: Simulator, env: int) -> Scene:
    """Show each replica: KV use as last reported, running and waiting requests, what is left."""
    s = simulator.state
    rows = []
    for r in range(int(s.env[env]["num_replicas"])):
        shown, v = s.observation[env, :, r], s.replica[env, r]
        name = scenario.spec.types[v["type_idx"]].name
        tokens = shown[OUTSTANDING_PROMPT_TOKENS]
        up = shown[UP] > 0
        rows.append(
            Row(
                f"{r}  {name}",
                float(shown[KV_CACHE_USAGE]),
                _classes(simulator, env, _of(simulator, env, r, RUNNING)),
                _classes(simulator, env, _of(simulator, env, r, QUEUED)),
                f"{tokens:,.0f} prompt tokens, speed {v['speed']:.2f}",
                lit=bool(up),
                down=not up,
            )
        )
    request = int(s.env[env]["deciding"])
    question = "the episode is over"
    if request >= 0:
        q = s.request[env, request]
        question = (
            f"where to: request {request}, {q['prompt']:,} prompt tokens, about"
            f" {q['predicted']:,.0f} to generate"
        )
    return Scene(
        progress(scenario.name, s.env[env], "requests"),
        question,
        "KV cache",
        "running (full) and waiting requests",
        tuple(rows),
        simulator.max_replicas,
        share_ended(s.env[env], "requests"),
        _legend(scenario),
    )


def engine_scene(scenario: Scenario, simulator: Simulator, env: int, asked: str) -> Scene:
    """Show an engine and its requests, those first that may be chosen, by arrival.

    Args:
        scenario: What is played.
        simulator: Plays it.
        env: Environment.
        asked: What the choice that is due is about, `admit` or `preempt`.
    """
    s = simulator.state
    v = s.replica[env, 0]
    capacity = int(simulator.params.num_blocks[v["type_idx"]])
    running, waiting = (_of(simulator, env, 0, status) for status in (RUNNING, QUEUED))
    block_size = int(simulator.params.block_size)
    rows = [
        Row(
            scenario.spec.types[v["type_idx"]].name,
            (capacity - int(v["free_blocks"])) / capacity,
            note=f"{len(running)} running, {len(waiting)} waiting",
        )
    ]
    due = s.env[env]["asking"] >= 0
    parts = [(running, True), (waiting, False)]
    for part, runs in parts if asked == "preempt" else parts[::-1]:
        for request in part.tolist():
            q = s.request[env, request]
            done, held = int(q["generated"]), int(q["prompt"] + q["generated"])
            if runs:
                decoded = int(v["iteration"] - q["join_iter"]) if q["join_iter"] >= 0 else 0
                done, held = done + decoded, int(q["computed"]) + decoded
            squares = (int(q["slo_class"]),) * -(-100 * -(-held // block_size) // capacity)
            rows.append(
                Row(
                    f"{request}  {'runs' if runs else 'waits'}",
                    min(1.0, done / max(1.0, float(q["predicted"]))),
                    squares if runs else (),
                    () if runs else squares,
                    f"{q['prompt']:,} prompt, {done:,} of ~{q['predicted']:,.0f} tokens",
                    lit=bool(due) and runs == (asked == "preempt"),
                )
            )
    return Scene(
        progress(scenario.name, s.env[env], "requests"),
        f"whom to {asked}" if due else "the episode is over",
        "KV cache; tokens",
        "KV held (full) or needed; a square is 1 % of it",
        tuple(rows),
        1 + _MOST_REQUESTS,
        share_ended(s.env[env], "requests"),
        _legend(scenario),
    )


def cluster_scene(scenario: Scenario, simulator: Simulator, env: int) -> Scene:
    """Show each replica as `dispatch_scene` does; where an engine asks, it is the one that is lit.

    Args:
        scenario: What is played.
        simulator: Plays it.
        env: Environment.
    """
    scene = dispatch_scene(scenario, simulator, env)
    due = simulator.state.env[env]
    if scenario.spec.disaggregated:
        return _with_roles(scene, simulator, env)
    if due["decision"] == MIGRATE:
        return scene._replace(question="who moves to another replica")
    if scenario.spec.tiered:
        scene = _with_tiers(scene, simulator, env)
    r = int(due["asking"])
    if r < 0:
        return scene
    if due["decision"] == RETAIN:
        q = simulator.state.request[env, due["deciding"]]
        tokens = int(q["table_len"]) * int(simulator.params.block_size)
        what = f"{tokens:,} tokens of KV of request {due['deciding']}"
        question = f"replica {r}: what becomes of {what}"
        rows = [row._replace(lit=i == r) for i, row in enumerate(scene.rows)]
        return scene._replace(question=question, rows=tuple(rows))
    what = "admit" if due["decision"] == ADMIT else "preempt"
    rows = [row._replace(lit=i == r) for i, row in enumerate(scene.rows)]
    return scene._replace(question=f"replica {r}: whom to {what}", rows=tuple(rows))


#: What a replica of each role is for.
_ROLES = {PREFILL_ONLY: "prefills", DECODE_ONLY: "decodes"}


def _with_roles(scene: Scene, simulator: Simulator, env: int) -> Scene:
    """Show who prefills and who decodes, and whose KV is on its way; who may be chosen is lit."""
    p, s = simulator.params, simulator.state
    rows = []
    for r, row in enumerate(scene.rows):
        coming = [_of(simulator, env, r, status) for status in (TRANSFERRING, LANDED)]
        role = _ROLES.get(int(p.role[s.replica[env, r]["type_idx"]]), "does all")
        more = sum((_classes(simulator, env, part) for part in coming), ())
        rows.append(
            row._replace(
                waiting=more + row.waiting,
                note=f"{role}, {row.note}",
                lit=bool(s.allowed[env, r]) and s.env[env]["deciding"] >= 0,
            )
        )
    question = scene.question
    if s.env[env]["decision"] == PLACE:
        question = question.replace("where to", "where to decode", 1)
    return scene._replace(question=question, rows=tuple(rows))


def _with_tiers(scene: Scene, simulator: Simulator, env: int) -> Scene:
    """Show how full tiers are, those of a replica below its GPU's bar, and the store's row."""
    p, s = simulator.params, simulator.state
    now_s, rows = s.env[env]["now_s"], []
    sizes = p.tier_num_blocks[s.replica[env]["type_idx"]]
    for r, row in enumerate(scene.rows):
        coming = [_of(simulator, env, r, status) for status in (TRANSFERRING, LANDED)]
        more = sum((_classes(simulator, env, part) for part in coming), ())
        own = {
            name: s.tier[env, r, tier]["num_blocks"] / sizes[r, tier]
            for tier, name in ((HOST, "host"), (DISK, "disk"))
            if sizes[r, tier]
        }
        notes = [f"{name} {share:.0%}" for name, share in own.items()]
        notes += ["KV moves"] * bool(s.replica[env, r]["slowed_until_s"] > now_s)
        rows.append(
            row._replace(
                waiting=more + row.waiting,
                behind=tuple(map(float, own.values())),
                note=", ".join(notes),
            )
        )
    size = int(sizes[0, STORE])
    if size:
        held = float(s.env[env]["store_num_blocks"]) / size
        busy = max(s.env[env]["store_read_free_s"], s.env[env]["store_write_free_s"]) - now_s
        note = f"{held:.0%} full" + (f", busy for {busy:.2f} s" if busy > 0 else "")
        rows.append(Row("store", held, note=note))
    return scene._replace(
        bar="KV cache; tiers below",
        rows=tuple(rows),
        num_rows=scene.num_rows + bool(size),
    )
