"""Where requests decode that are prefilled apart: what is seen, who decides, what is noted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from servegym.cluster import state as st
from servegym.errors import ConfigError
from servegym.export.fleet import FleetWeights, save_fleet
from servegym.policy.contract import FIRST_NOMINAL, NUM_NOMINAL, Group, ReplicaFeature
from servegym.policy.observe import observe_batch
from servegym.policy.placed_scores import NUM_TERMS, TERMS
from servegym.policy.run_placed import make_simulator
from servegym.scenario import load_scenario
from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Hardware, Rates, fleet_facts, kv_tokens_per_s
from servegym.serve.loaded_policy import load_policy
from servegym.serve.runtime import RuntimeConfig
from servegym.serve.state import EngineMetrics, LiveState
from servegym.serve.transfers import Transfers

#: What a router counts as the simulator does.
COUNTED = (
    "up",
    "outstanding_requests",
    "outstanding_prompt_tokens",
    "outstanding_predicted_tokens",
    "pending_prefill_tokens",
    "recent_ttft_s",
    "recent_tpot_s",
    "prefills",
    "decodes",
    "kv_tokens_per_s",
    "has_prefill",
)
RATES = {"prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01, "kv_tokens_per_s": 10_000.0}


class Follower:
    """Feeds the event log of a simulator whose requests are placed to a live state."""

    def __init__(self, simulator, seen) -> None:
        facts = seen[FIRST_NOMINAL : FIRST_NOMINAL + NUM_NOMINAL].copy()
        self.simulator, self.table = simulator, simulator.episodes[0].table
        self.state = LiveState(facts, simulator.spec.slo_classes, allow_reject=True)
        self.transfers = Transfers(self.state)
        for r, t in enumerate(simulator.episodes[0].type_idx):
            rate = seen[ReplicaFeature["KV_TOKENS_PER_S"], r]
            self.transfers.set_role(r, simulator.spec.types[t].role, rate)
        self.requests, self.hits, self.moving = {}, {}, {}
        self.num_seen = 0

    def catch_up(self) -> None:
        events = self.simulator.events()
        for event in events[self.num_seen :]:
            self.take(
                event["kind"], int(event["request"]), int(event["replica"]), float(event["time_s"])
            )
        self.num_seen = len(events)

    def take(self, kind: int, i: int, r: int, now_s: float) -> None:
        state, table, transfers = self.state, self.table, self.transfers
        if kind == st.EV_ARRIVE:
            self.requests[i] = state.arrive(
                now_s,
                key=str(i),
                prompt_tokens=table.prompt_tokens[i],
                predicted_output_tokens=table.predicted_output_tokens[i],
                slo_class=int(table.slo_class[i]),
            )
        elif kind in (st.EV_DISPATCH, st.EV_PLACE):
            state.replicas[ReplicaFeature["PREFIX_HIT_TOKENS"], r] = self.hits[i][r]
            if kind == st.EV_PLACE:
                transfers.place(self.moving[i], self.requests[i], r, now_s)
            elif transfers.only_prefills(r):
                self.moving[i] = transfers.begin(self.requests[i], r, now_s)
            else:
                state.dispatch(self.requests[i], r, now_s)
        elif kind == st.EV_PREFILLED:
            transfers.prefilled(self.moving[i])
        elif kind == st.EV_FIRST_TOKEN:
            state.first_token(self.requests[i], now_s)
            if i in self.moving:
                transfers.landed(self.moving.pop(i), self.requests[i])
        elif kind == st.EV_FINISH:
            state.finish(self.requests[i], now_s, int(table.output_tokens[i]))

    def observe(self, seen):
        self.catch_up()
        env = self.simulator.state.env[0]
        i, now_s = int(env["deciding"]), float(env["now_s"])
        self.hits[i] = seen[ReplicaFeature["PREFIX_HIT_TOKENS"]].copy()
        placing = env["decision"] == st.PLACE
        self.transfers.see(self.moving[i] if placing else None, now_s)
        return self.state.observe(self.requests[i], now_s, hit_tokens=self.hits[i])


@pytest.mark.parametrize("name", ["pd-equal", "pd-unequal"])
def test_counters_of_a_fleet_with_roles_are_the_simulators(name):
    scenario = load_scenario(name)
    simulator = make_simulator(
        scenario.spec, [scenario.episode(2, num_requests=120, load=1.2)], record=True
    )
    rng, follower, checked = np.random.default_rng(1), None, np.zeros(2, np.int64)
    needs = Group.COUNTERS | Group.METRICS | Group.PREFIX | Group.ROLES
    while simulator.advance()[0] == st.DECISION:
        want, _ = observe_batch(simulator, needs)
        follower = follower or Follower(simulator, want.replicas[0])
        got = follower.observe(want.replicas[0])
        for feature in COUNTED:
            row = ReplicaFeature[feature.upper()]
            np.testing.assert_allclose(
                got.replicas[0, row], want.replicas[0, row], rtol=1e-9, atol=1e-9, err_msg=feature
            )
        checked[int(simulator.state.env["decision"][0] == st.PLACE)] += 1
        allowed = np.flatnonzero(want.mask[0, :-2])
        simulator.apply(np.array([int(rng.choice(allowed))]))
    assert checked[0] == 120
    assert checked[1] > 60


def make_transfers() -> tuple[LiveState, Transfers]:
    state = LiveState(fleet_facts([Rates(**RATES)] * 2))
    transfers = Transfers(state)
    transfers.set_role(0, "prefill", 10_000.0)
    transfers.set_role(1, "decode", 5_000.0)
    return state, transfers


def test_kv_on_its_way_keeps_links_busy_and_memory_held():
    state, transfers = make_transfers()
    rows = state.replicas

    def row(name: str) -> list[float]:
        return rows[ReplicaFeature[name.upper()]].tolist()

    moving = []
    for k in range(2):
        request = state.arrive(0.0, key="k", prompt_tokens=1000.0, predicted_output_tokens=9.0)
        state.observe(request, 0.0)
        one = transfers.begin(request, 0, 0.0)
        assert row("outstanding_requests") == [1.0, k]
        assert row("pending_prefill_tokens") == [1000.0, 0.0]
        transfers.prefilled(one)
        assert row("num_holding") == [k + 1.0, k]
        transfers.see(one, 2.0)
        assert row("has_prefill") == [1.0, 0.0]
        # the slower link decides: 0.2 s each, one after the other
        assert row("link_busy_s") == pytest.approx([0.2 * k, 0.2 * k])
        transfers.place(one, request, 1, 2.0)
        assert row("arriving_tokens") == [0.0, 1000.0 * (k + 1)]
        moving.append((one, request))
    assert row("pending_prefill_tokens") == [0.0, 0.0]
    transfers.see(None, 2.1)
    assert row("has_prefill") == [0.0, 0.0]
    assert row("link_busy_s") == pytest.approx([0.3, 0.3])
    assert transfers.left_s(moving[1][0], 2.1) == pytest.approx(0.3)
    assert transfers.is_holding(0)
    for one, request in moving:
        transfers.landed(one, request)
    assert row("num_holding") == row("arriving_tokens") == [0.0, 0.0]
    assert row("outstanding_requests") == [0.0, 2.0]
    assert not transfers.is_holding(0)


def test_the_rate_of_a_link_is_that_of_the_models_kv():
    hardware = Hardware(gpu="A100-SXM-80GB", model="Llama-3.1-8B", link_gb_per_s=40.0)
    # 32 layers, 8 heads of 128, K and V, two bytes each
    assert kv_tokens_per_s(hardware) == pytest.approx(40e9 / (32 * 8 * 128 * 2 * 2))
    assert kv_tokens_per_s(hardware.model_copy(update={"link_gb_per_s": None})) == 0.0
    assert kv_tokens_per_s(Rates(**RATES)) == 10_000.0


def placed_file(folder: Path, **weights: float) -> str:
    """A learned policy whose placing costs only what is named."""
    place = np.zeros(NUM_TERMS)
    for name, weight in weights.items():
        place[TERMS.index(name)] = weight
    dispatch = np.zeros(NUM_TERMS + 1)
    dispatch[-1] = 1e9  # nothing is rejected
    dispatch[TERMS.index("prefill_only")] = -1.0
    return str(save_fleet(FleetWeights("placed", {"dispatch": dispatch, "place": place}), folder))


def make_dispatcher(policy: str, **runtime) -> Dispatcher:
    """One replica that prefills, and two that decode, of which the first is the busier."""
    config = DispatchConfig(runtime=RuntimeConfig(policy=policy, **runtime))
    dispatcher = Dispatcher(config, ["p", "d0", "d1"], fleet_facts([Rates(**RATES)] * 3))
    for slot, role in enumerate(("prefill", "decode", "decode")):
        dispatcher.placing.set_role(slot, role, 10_000.0)
        dispatcher.update_metrics(slot, EngineMetrics(0, 0, 0.1), dispatcher.clock())
    busy = dispatcher.arrive("busy", key="busy", max_tokens=9)
    dispatcher.decide(busy, allowed=np.array([False, True, False]))
    return dispatcher


def place_one(dispatcher: Dispatcher) -> str:
    job = dispatcher.arrive("a prompt", key="key", max_tokens=9)
    dispatcher.decide(job, allowed=dispatcher.placing.transfers.prefilling)
    assert dispatcher.names[job.replica] == "p"
    dispatcher.placing.prefilled(job)
    decision = dispatcher.placing.decide(job, np.ones(3, np.bool_))
    dispatcher.first_token(job)
    dispatcher.finish(job, 3)
    assert job.prefill is not None
    assert job.prefill.replica == "p"
    return dispatcher.names[decision.action]


def test_a_learned_policy_dispatches_and_places(tmp_path):
    spreads = make_dispatcher(placed_file(tmp_path / "a", log_tpot=1.0))
    gathers = make_dispatcher(placed_file(tmp_path / "b", log_tpot=-1.0))
    # a step of d0 has one request more, which takes time with this
    for dispatcher in (spreads, gathers):
        dispatcher.state.replicas[ReplicaFeature["DECODE_SEQ_S"]] = 0.001
    assert (place_one(spreads), place_one(gathers)) == ("d1", "d0")
    assert spreads.runtime.counters.num_policy == 3


def test_the_fallback_places_what_is_only_watched(tmp_path):
    policy = placed_file(tmp_path, log_tpot=-1.0)
    dispatcher = make_dispatcher(policy, mode="shadow", fallback="round-robin+least-outstanding")
    dispatcher.state.replicas[ReplicaFeature["DECODE_SEQ_S"]] = 0.001
    assert place_one(dispatcher) == "d1"
    assert dispatcher.runtime.counters.num_differed >= 1


@pytest.mark.parametrize("text", ["splitwise+splitwise", "llm-d-pd+llm-d", "conductor+least-tpot"])
def test_rules_of_both_decisions_are_live(text):
    dispatcher = make_dispatcher(text)
    assert dispatcher.runtime.loaded.version.count("+") == 1
    assert place_one(dispatcher) in ("d0", "d1")
    assert place_one(make_dispatcher("least-outstanding")) == "d1"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("least-outstanding+srpt", "srpt"),
        ("least-outstanding+least-tpot+least-tpot", "one part or two"),
        ("what-if+least-tpot", "cannot be live"),
    ],
)
def test_what_cannot_place_is_refused(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_policy(text, RuntimeConfig())


def test_a_file_that_places_needs_no_other_rule(tmp_path):
    with pytest.raises(ConfigError, match=r"leave out \+least-tpot"):
        load_policy(placed_file(tmp_path) + "+least-tpot", RuntimeConfig())
