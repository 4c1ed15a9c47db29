"""llm-d's scheduling file, an `EndpointPickerConfig`, as a rule.

The file lists plugins, and profiles that say which of them score replicas, with which weights. What
it describes is a rule of servegym's with parameters, `llm-d` or `llm-d-pd`, and is read into the
text of that rule. Names and defaults are those of llm-d's inference scheduler and of the Gateway
API inference extension, which it comes from. What has no counterpart is refused, not left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from servegym.baselines.parts import join_parts
from servegym.documents import checked, read_mapping
from servegym.errors import ConfigError, unknown_name

_KIND = "EndpointPickerConfig"
#: Of the files; no exported policy ends so.
SUFFIXES = (".yaml", ".yml")

#: Scorers, and the weight of `llm-d` that each is.
_SCORERS = {
    "queue-scorer": "queue",
    "kv-cache-utilization-scorer": "kv",
    "kv-cache-scorer": "kv",
    "prefix-cache-scorer": "prefix",
    "precise-prefix-cache-scorer": "prefix",
    "load-aware-scorer": "load",
    "running-requests-size-scorer": "running",
    "active-request-scorer": "active",
}
_PICKERS = ("max-score-picker", "random-picker", "weighted-random-picker")
_FILTERS = ("decode-filter", "prefill-filter")
_SINGLE, _PD_HANDLERS = "single-profile-handler", ("pd-profile-handler", "disagg-profile-handler")
_PREFIX_DECIDER, _ALWAYS = "prefix-based-pd-decider", "always-disagg-pd-decider"
#: Plugins that fetch, parse or pass on, and have no say in who is chosen.
_SILENT = (
    "core-metrics-extractor",
    "disagg-headers-handler",
    "metrics-data-source",
    "model-server-protocol-metrics",
    "openai-parser",
    "prefill-header-handler",
    "utilization-detector",
    "vllmhttp-parser",
)
_KNOWN = (*_SCORERS, *_PICKERS, *_FILTERS, _SINGLE, *_PD_HANDLERS, _PREFIX_DECIDER, _ALWAYS)
#: Parameters that say how prefixes are found: in the simulator by looking into the engines' caches,
#: live by `dispatch.prefix`.
_PREFIX_PARAMETERS = {
    *("autoTune", "blockSize", "blockSizeTokens", "hashBlockSize", "maxPrefixBlocksToMatch"),
    *("lruCapacityPerServer", "mode", "indexerConfig", "tokenProcessorConfig", "kvEventsConfig"),
    *("speculativeIndexing", "speculativeTTL"),
}
#: Parameters of plugins that choose, beside those: of a retry's endpoints only the first counts.
_PARAMETERS: Mapping[str, set[str]] = {
    "prefix-cache-scorer": _PREFIX_PARAMETERS,
    "precise-prefix-cache-scorer": _PREFIX_PARAMETERS,
    "load-aware-scorer": {"threshold"},
    "active-request-scorer": {"requestTimeout", "idleThreshold", "maxBusyScore"},
    "max-score-picker": {"maxNumOfEndpoints"},
    "random-picker": {"maxNumOfEndpoints"},
    "weighted-random-picker": {"maxNumOfEndpoints"},
    "prefix-based-pd-decider": {"nonCachedTokens"},
    "pd-profile-handler": {
        *("decodeProfile", "prefillProfile", "prefixPluginType", "prefixPluginName"),
        *("primaryPort", "deciderPluginName"),
    },
    "disagg-profile-handler": {
        *("profiles", "deciders", "decodeProfile", "prefillProfile", "encodeProfile"),
        *("deciderPluginName", "prefillDeciderPluginName", "encodeDeciderPluginName"),
    },
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Plugin(_Part):
    type: str
    name: str = ""
    parameters: dict[str, Any] | None = None

    @property
    def called(self) -> str:
        return self.name or self.type


class _Reference(_Part):
    plugin: str = Field(alias="pluginRef")
    weight: float = Field(1.0, ge=0)


class _Profile(_Part):
    name: str
    plugins: tuple[_Reference, ...] = ()


class _File(_Part):
    version: Literal["inference.networking.x-k8s.io/v1alpha1", "llm-d.ai/v1alpha1"] = Field(
        alias="apiVersion"
    )
    kind: Literal["EndpointPickerConfig"]
    plugins: tuple[_Plugin, ...] = Field(min_length=1)
    profiles: tuple[_Profile, ...] = Field((), alias="schedulingProfiles")
    gates: tuple[str, ...] = Field((), alias="featureGates")
    # where metrics come from, how requests are read, and whom to shed where all are saturated
    data_layer: Any = Field(None, alias="dataLayer")
    data: Any = None
    parser: Any = None
    request_handler: Any = Field(None, alias="requestHandler")
    saturation: Any = Field(None, alias="saturationDetector")


def scheduling_rule(path: Path) -> str:
    """Read a scheduling file.

    Args:
        path: Of the file.

    Returns:
        The text of the rule that it describes, such as `"llm-d:queue=1,kv=0,prefix=2"`; two parts
        if it says who prefills and who decodes.

    Raises:
        ConfigError: If it is no such file, or asks for what servegym has no counterpart of.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no scheduling file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    data = read_mapping(text, str(path), "apiVersion, kind: EndpointPickerConfig and plugins")
    if data.get("kind") != _KIND:
        raise ConfigError(
            f"{path} must be llm-d's scheduling file, with kind: {_KIND}; its kind is "
            f"{data.get('kind')!r}"
        )
    if "flowControl" in data or "flowControl" in (data.get("featureGates") or ()):
        raise ConfigError(
            f"{path}: flowControl holds requests back before one is chosen for, and has no "
            "counterpart in the rule: take it out to judge the choice alone"
        )
    file = checked(data, str(path), _File)
    try:
        return _rule(file)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _rule(file: _File) -> str:
    plugins = _by_name(file)
    handlers = [p for p in plugins.values() if p.type in (_SINGLE, *_PD_HANDLERS)]
    profiles = {profile.name: profile for profile in file.profiles}
    if not profiles:  # one of all there is
        given = [_Reference(pluginRef=name) for name in plugins]
        profiles = {"default": _Profile(name="default", plugins=tuple(given))}
    if len(handlers) > 1:
        names = ", ".join(sorted(handler.called for handler in handlers))
        raise ConfigError(f"there must be one profile handler, got {names}")
    if handlers and handlers[0].type in _PD_HANDLERS:
        return _apart(handlers[0], plugins, profiles)
    if len(profiles) > 1:
        raise ConfigError(
            f"profiles {', '.join(profiles)} need a handler that says which of them is used: "
            f"one of {', '.join(_PD_HANDLERS)}"
        )
    (profile,) = profiles.values()
    parameters = _parameters(profile, plugins, without="prefill-filter")
    return "random" if parameters is None else _text("llm-d", parameters)


def _by_name(file: _File) -> dict[str, _Plugin]:
    """Plugins by the names that profiles call them by, each of a known type and parameters."""
    found: dict[str, _Plugin] = {}
    for plugin in file.plugins:
        if plugin.type in _SILENT:
            pass
        elif plugin.type not in _KNOWN:
            raise ConfigError(unknown_name("plugin", plugin.type, (*_KNOWN, *_SILENT)))
        else:
            for key in plugin.parameters or ():
                known = _PARAMETERS.get(plugin.type, set())
                if key not in known:
                    raise ConfigError(
                        unknown_name(f"parameter of {plugin.called}", key, known)
                        if known
                        else f"{plugin.called} has no parameters, got {key!r}"
                    )
        if plugin.called in found:
            raise ConfigError(f"the plugin {plugin.called} is given twice: give one a name")
        found[plugin.called] = plugin
    for profile in file.profiles:
        for reference in profile.plugins:
            if reference.plugin not in found:
                raise ConfigError(unknown_name("pluginRef", reference.plugin, found))
    double = [name for name, count in Counter(p.name for p in file.profiles).items() if count > 1]
    if double:
        raise ConfigError(f"the profile {double[0]} is given twice: give one another name")
    return found


def _parameters(
    profile: _Profile, plugins: Mapping[str, _Plugin], *, without: str
) -> dict[str, float] | None:
    """Return the parameters of `llm-d` that a profile is; `None` if it chooses at random.

    Args:
        profile: Which.
        plugins: By name.
        without: A filter that it may not have.
    """
    found: dict[str, float] = {"queue": 0.0, "kv": 0.0, "prefix": 0.0}
    pickers = []
    for reference in profile.plugins:
        plugin = plugins[reference.plugin]
        given = plugin.parameters or {}
        if plugin.type in _PICKERS:
            pickers.append(plugin.type)
        elif plugin.type == without:
            raise ConfigError(
                f"the profile {profile.name} has a {without}: replicas that it leaves are not "
                "those that this profile chooses among here"
            )
        elif plugin.type in _SCORERS:
            weight = _SCORERS[plugin.type]
            found[weight] = found.get(weight, 0.0) + reference.weight
            if plugin.type == "load-aware-scorer":
                found["load_threshold"] = _number(plugin, "threshold", 128.0, low=1.0)
            elif plugin.type == "active-request-scorer":
                if "requestTimeout" in given:
                    raise ConfigError(
                        f"{plugin.called} has a requestTimeout: here a request is counted until it "
                        "ends; take it out"
                    )
                found["idle"] = _number(plugin, "idleThreshold", 0.0)
                found["busy"] = _number(plugin, "maxBusyScore", 1.0, high=1.0)
    if len(pickers) > 1:
        raise ConfigError(f"the profile {profile.name} must have one picker, got {len(pickers)}")
    if pickers == ["random-picker"]:
        return None
    if not any(found.get(weight) for weight in set(_SCORERS.values())):
        return None  # all score the same, and equal scores are drawn from
    if pickers == ["weighted-random-picker"]:
        found["drawn"] = 1.0
    return found


def _apart(
    handler: _Plugin, plugins: Mapping[str, _Plugin], profiles: Mapping[str, _Profile]
) -> str:
    """Return the rule of a file that lets some replicas prefill and others decode."""
    given = handler.parameters or {}
    named, deciders = given.get("profiles") or {}, given.get("deciders") or {}
    if "encode" in named or "encode" in deciders or given.get("encodeDeciderPluginName"):
        raise ConfigError(f"{handler.called} encodes on replicas of their own: servegym has none")
    names = {
        stage: named.get(stage) or given.get(f"{stage}Profile") or stage
        for stage in ("decode", "prefill")
    }
    found = {}
    for stage, name in names.items():
        if name not in profiles:
            raise ConfigError(f"{handler.called}: {unknown_name('profile', name, profiles)}")
        other = "prefill-filter" if stage == "decode" else "decode-filter"
        parameters = _parameters(profiles[name], plugins, without=other)
        if parameters is None:
            raise ConfigError(
                f"the profile {name} chooses at random: where some prefill and others decode, "
                "servegym knows llm-d's choice by score alone; give it a scorer with a weight"
            )
        found[stage] = parameters
    if len(profiles) > 2:
        others = sorted(set(profiles) - set(names.values()))
        raise ConfigError(f"{handler.called} has no use for the profile {', '.join(others)}")
    if found["decode"] != found["prefill"]:
        raise ConfigError(
            f"the profiles {names['prefill']} and {names['decode']} score differently: "
            "llm-d-pd has one set of weights for both"
        )
    decider = (
        deciders.get("prefill")
        or given.get("prefillDeciderPluginName")
        or given.get("deciderPluginName")
        or (_PREFIX_DECIDER if handler.type == "pd-profile-handler" else None)
    )
    dispatch = {**found["prefill"], "non_cached_tokens": _non_cached_tokens(decider, plugins)}
    return join_parts((_text("llm-d-pd", dispatch), _text("llm-d", found["decode"])))


def _non_cached_tokens(decider: str | None, plugins: Mapping[str, _Plugin]) -> float:
    """From how many uncached tokens on somebody else prefills; 0: never."""
    if decider is None:
        return 0.0
    known = {name: p for name, p in plugins.items() if p.type in (_PREFIX_DECIDER, _ALWAYS)}
    if decider not in known:
        raise ConfigError(unknown_name("decider", decider, known))
    if known[decider].type == _ALWAYS:
        return 1.0  # the last token of a prompt is never cached
    return _number(known[decider], "nonCachedTokens", 0.0)


def _number(
    plugin: _Plugin, key: str, default: float, *, low: float = 0.0, high: float = 1e9
) -> float:
    value = (plugin.parameters or {}).get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(
            f"{key} of {plugin.called} must be a number from {low:g} to {high:g}, got {value!r}"
        )
    return float(value)


def _text(name: str, parameters: Mapping[str, float]) -> str:
    return f"{name}:" + ",".join(f"{key}={value:.15g}" for key, value in parameters.items())
