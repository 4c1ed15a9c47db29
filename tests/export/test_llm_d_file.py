"""llm-d's scheduling files as rules: their weights, their choices, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from servegym.errors import ConfigError
from servegym.export.llm_d_file import scheduling_rule
from servegym.export.resolve import resolve_dispatch, resolve_policy
from servegym.policy.contract import (
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.placed import Placed
from servegym.policy.policy import Observations
from servegym.serve.loaded_policy import load_policy
from servegym.serve.runtime import RuntimeConfig

EXAMPLE = Path(__file__).parents[2] / "examples/llm-d.yaml"
HEAD = {"apiVersion": "inference.networking.x-k8s.io/v1alpha1", "kind": "EndpointPickerConfig"}


def profile(name: str = "default", **weights: float | None) -> dict:
    plugins = [
        {"pluginRef": ref.replace("_", "-")} | ({} if weight is None else {"weight": weight})
        for ref, weight in weights.items()
    ]
    return {"name": name, "plugins": plugins}


def plugin(kind: str, name: str | None = None, **parameters) -> dict:
    named = {"name": name} if name else {}
    return {"type": kind, **named} | ({"parameters": parameters} if parameters else {})


def written(tmp_path, plugins, *profiles, **more) -> Path:
    path = tmp_path / "epp.yaml"
    listed = [plugin(kind) if isinstance(kind, str) else kind for kind in plugins]
    data = {**HEAD, "plugins": listed, **({"schedulingProfiles": [*profiles]} if profiles else {})}
    path.write_text(yaml.safe_dump(data | more))
    return path


def test_the_default_of_the_scheduler_is_the_rule_s_own(tmp_path):
    plugins = ["queue-scorer", "kv-cache-utilization-scorer", "prefix-cache-scorer"]
    weights = {"queue_scorer": 2, "kv_cache_utilization_scorer": 2, "prefix_cache_scorer": 3}
    path = written(tmp_path, plugins, profile(**weights))
    assert scheduling_rule(path) == "llm-d:queue=2,kv=2,prefix=3"
    found, rule = resolve_policy(str(path)), resolve_policy("llm-d")
    assert found.params.tolist() == rule.params.tolist()
    assert found.decide is rule.decide


@pytest.mark.parametrize(
    ("plugins", "profiles", "rule"),
    [
        # without profiles there is one of all plugins, each with weight 1
        (["queue-scorer", "prefix-cache-scorer"], [], "llm-d:queue=1,kv=0,prefix=1"),
        # a weight left out is 1, names may be given, and a filter of roles leaves all without one
        (
            [plugin("queue-scorer", "q"), "decode-filter", "single-profile-handler"],
            [profile(q=None, decode_filter=None)],
            "llm-d:queue=1,kv=0,prefix=0",
        ),
        (
            [plugin("load-aware-scorer", threshold=10), "kv-cache-scorer", "max-score-picker"],
            [profile(load_aware_scorer=2, kv_cache_scorer=0.5, max_score_picker=None)],
            "llm-d:queue=0,kv=0.5,prefix=0,load=2,load_threshold=10",
        ),
        (
            [plugin("active-request-scorer", idleThreshold=2, maxBusyScore=0.5)],
            [profile(active_request_scorer=1)],
            "llm-d:queue=0,kv=0,prefix=0,active=1,idle=2,busy=0.5",
        ),
        (
            ["running-requests-size-scorer", "metrics-data-source"],
            [profile(running_requests_size_scorer=3)],
            "llm-d:queue=0,kv=0,prefix=0,running=3",
        ),
        # both look for the longest prefix
        (
            ["prefix-cache-scorer", "precise-prefix-cache-scorer"],
            [profile(prefix_cache_scorer=1, precise_prefix_cache_scorer=2)],
            "llm-d:queue=0,kv=0,prefix=3",
        ),
        (
            ["queue-scorer", "random-picker"],
            [profile(queue_scorer=1, random_picker=None)],
            "random",
        ),
        (["decode-filter"], [profile(decode_filter=None)], "random"),
        (
            ["queue-scorer", "weighted-random-picker"],
            [profile(queue_scorer=1, weighted_random_picker=None)],
            "llm-d:queue=1,kv=0,prefix=0,drawn=1",
        ),
    ],
)
def test_a_profile_becomes_a_rule_with_its_weights(tmp_path, plugins, profiles, rule):
    assert scheduling_rule(written(tmp_path, plugins, *profiles)) == rule


def test_the_file_makes_the_choice_that_its_scores_are_worth(tmp_path):
    seen = Observations(
        np.zeros((1, NUM_REPLICA_FEATURES, 3)),
        np.ones((1, NUM_REQUEST_FEATURES)),
        np.array([[True, True, True, False, False]]),
    )
    replicas = seen.replicas[0]
    replicas[ReplicaFeature.UP] = 1.0
    seen.request[0, RequestFeature.PROMPT_TOKENS] = 100.0
    replicas[ReplicaFeature.NUM_WAITING] = 4.0, 2.0, 0.0  # scores 0, 0.5, 1
    replicas[ReplicaFeature.KV_CACHE_USAGE] = 0.0, 0.5, 0.9  # 1, 0.5, 0.1
    replicas[ReplicaFeature.PREFIX_HIT_TOKENS] = 0.0, 50.0, 0.0  # 0, 0.5, 0
    plugins = ["queue-scorer", "kv-cache-utilization-scorer", "prefix-cache-scorer"]
    for weights, chosen in (
        ((2, 2, 3), 1),  # 2, 3.5, 2.2
        ((2, 2, 0), 2),  # 2, 2, 2.2
        ((0, 2, 0), 0),  # 2, 1, 0.2
    ):
        named = dict(zip(("queue_scorer", "kv_cache_utilization_scorer"), weights[:2], strict=True))
        path = written(tmp_path, plugins, profile(**named, prefix_cache_scorer=weights[2]))
        found = resolve_policy(str(path))
        found.reset(1, 0)
        assert found.act(seen, np.array([0])).tolist() == [chosen]


APART = ["prefill-filter", "decode-filter", "prefix-cache-scorer", "queue-scorer"]
STAGES = (
    profile("prefill", prefill_filter=None, prefix_cache_scorer=2, queue_scorer=1),
    profile("decode", decode_filter=None, prefix_cache_scorer=2, queue_scorer=1),
)
SCORES = "queue=1,kv=0,prefix=2"


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        (
            [
                plugin("prefix-based-pd-decider", nonCachedTokens=16),
                plugin("disagg-profile-handler", deciders={"prefill": "prefix-based-pd-decider"}),
            ],
            16,
        ),
        (
            [
                plugin("prefix-based-pd-decider", "decider", nonCachedTokens=100),
                plugin("pd-profile-handler", deciderPluginName="decider"),
            ],
            100,
        ),
        ([plugin("prefix-based-pd-decider"), plugin("pd-profile-handler")], 0),
        (
            [
                "always-disagg-pd-decider",
                plugin("pd-profile-handler", deciderPluginName="always-disagg-pd-decider"),
            ],
            1,
        ),
        (["disagg-profile-handler"], 0),  # without a decider nobody prefills for another
    ],
)
def test_prefill_apart_from_decode_becomes_a_rule_and_a_placement(tmp_path, more, tokens):
    path = written(tmp_path, [*APART, *more], *STAGES)
    expected = f"llm-d-pd:{SCORES},non_cached_tokens={tokens}+llm-d:{SCORES}"
    assert scheduling_rule(path) == expected
    found = resolve_dispatch(str(path))
    assert isinstance(found, Placed)
    assert found.name == expected
    with pytest.raises(ConfigError, match="says who prefills and who decodes"):
        resolve_policy(str(path))  # where one decision is taken
    live = load_policy(str(path), RuntimeConfig())
    assert (live.places, live.version) == (True, expected)


@pytest.mark.parametrize(
    ("plugins", "profiles", "words"),
    [
        (["no-hit-lru-scorer"], [], "unknown plugin 'no-hit-lru-scorer'.*active-request-scorer"),
        (["queue-scorerr"], [], "queue-scorerr.*did you mean queue-scorer"),
        ([plugin("queue-scorer", depth=3)], [], "queue-scorer has no parameters, got 'depth'"),
        (
            [plugin("load-aware-scorer", limit=3)],
            [],
            "unknown parameter of load-aware-scorer .limit.",
        ),
        (
            [plugin("load-aware-scorer", threshold=0)],
            [],
            "threshold of load-aware-scorer must be a number from 1 to 1e[+]09, got 0",
        ),
        (
            [plugin("active-request-scorer", requestTimeout="2m")],
            [],
            "active-request-scorer has a requestTimeout",
        ),
        (["queue-scorer"], [profile(kv_cache_scorer=1)], "unknown pluginRef 'kv-cache-scorer'"),
        (["queue-scorer", "queue-scorer"], [], "the plugin queue-scorer is given twice"),
        (["queue-scorer"], [profile("a"), profile("b")], "profiles a, b need a handler"),
        (["queue-scorer"], [profile("a"), profile("a")], "the profile a is given twice"),
        (["single-profile-handler", "pd-profile-handler"], [], "one profile handler, got"),
        (
            ["max-score-picker", "random-picker", "queue-scorer"],
            [profile(max_score_picker=None, random_picker=None, queue_scorer=1)],
            "the profile default must have one picker, got 2",
        ),
        (["prefill-filter", "queue-scorer"], [], "the profile default has a prefill-filter"),
        (
            [*APART, "disagg-profile-handler"],
            [STAGES[0], profile("decode", queue_scorer=1)],
            "the profiles prefill and decode score differently",
        ),
        ([*APART, "disagg-profile-handler"], [STAGES[0]], "unknown profile 'decode'"),
        ([*APART, "pd-profile-handler"], STAGES, "unknown decider 'prefix-based-pd-decider'"),
        (
            [*APART, plugin("disagg-profile-handler", deciders={"encode": "x"})],
            STAGES,
            "encodes on replicas of their own",
        ),
        (
            ["queue-scorer"],
            [profile(queue_scorer=-1)],
            "weight.*greater than or equal to 0, got -1",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused_in_one_sentence(tmp_path, plugins, profiles, words):
    with pytest.raises(ConfigError, match=words) as error:
        scheduling_rule(written(tmp_path, plugins, *profiles))
    assert str(error.value).startswith(str(tmp_path / "epp.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"kind": "InferencePool"}, "must be llm-d's scheduling file.*its kind is 'InferencePool'"),
        ({"apiVersion": "v1"}, "apiVersion.*llm-d.ai/v1alpha1.*got 'v1'"),
        ({"plugin": []}, "unknown key plugin; did you mean plugins"),
        ({"featureGates": ["flowControl"]}, "flowControl holds requests back"),
        ({"flowControl": {}}, "flowControl holds requests back"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, more, words):
    with pytest.raises(ConfigError, match=words):
        scheduling_rule(written(tmp_path, ["queue-scorer"], **more))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"no scheduling file at /no/epp\.yaml"):
        resolve_policy("/no/epp.yaml")


def test_a_live_router_loads_the_file_and_logs_the_rule_it_is():
    loaded = load_policy(str(EXAMPLE), RuntimeConfig())
    assert loaded.text == str(EXAMPLE)
    assert loaded.version == "llm-d:queue=1,kv=1,prefix=2"
    assert resolve_policy(loaded.version).params.tolist() == loaded.policy.params.tolist()
