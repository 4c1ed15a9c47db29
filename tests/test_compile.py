"""Compiling ahead: what is compiled is all that an environment, a router or an engine needs."""

from __future__ import annotations

import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from servegym.cli import main
from servegym.commands import compile as compile_command

EXAMPLES = Path(__file__).parents[1] / "examples"
RECORD = """
import runpy, sys
from servegym.cluster.kernel_cache import KernelCache

seen, real = set(), KernelCache.load_overload

def load(self, signature, target):
    function = self._py_func
    seen.add(f"{function.__module__}.{function.__qualname__} {signature}")
    return real(self, signature, target)

KernelCache.load_overload = load
"""
COMPILE = "from servegym.cli import main\nmain(['compile', '--jobs', '1'])\n"
USE = f"""
import asyncio
import gymnasium
import servegym
from servegym.baselines.registry import RULES, policy
from servegym.baselines.score import score_policy
from servegym.cluster.simulator import Simulator
from servegym.policy.run import run
from servegym.scenario import load_scenario
from servegym.serve.engine.fleet import Fleet, FleetConfig

runpy.run_path({str(EXAMPLES / "01_make_env.py")!r}, run_name="__main__")
runpy.run_path({str(EXAMPLES / "04_decide_live.py")!r}, run_name="__main__")
scenario = load_scenario("failures")
for decider in (*map(policy, RULES.names()), score_policy("expected_tokens * decode_step_s")):
    run(Simulator(scenario.spec, [scenario.episode(0, num_requests=40)]), decider)
played = [(name, {{}}) for name in ("Dispatch-v1", "Preemption-v0", "Cluster-v0", "Workflow-v0")]
for scenario_name in ("pd-equal", "near-full-kv", "agents-tiers"):
    played.append(("Cluster-v0", {{"scenario": scenario_name}}))
for name, settings in played:
    name = f"servegym/{{name}}"
    for env in (gymnasium.make(name, **settings), gymnasium.make_vec(name, num_envs=2, **settings)):
        _, info = env.reset(seed=1)
        for _ in range(30):
            *_, info = env.step(info["action_mask"].argmax(-1))
        env.close()


async def serve():
    fleet = Fleet(FleetConfig(scenario=scenario, port=0))
    await fleet.start()
    await fleet.stop()


asyncio.run(serve())
"""
SHOW = "\nprint('\\n@'.join(['', *sorted(seen)]))\n"


def keys(program: str) -> set[str]:
    """Kernels that a program asks the cache for."""
    done = subprocess.run(
        [sys.executable, "-c", RECORD + program + SHOW], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {line for line in done.stdout.splitlines() if line.startswith("@")}


@pytest.mark.slow
def test_everything_that_is_used_later_is_compiled_ahead():
    ahead, used = keys(COMPILE), keys(USE)
    assert used - ahead == set()
    assert len(used) > 30


def test_a_part_says_what_was_done_and_where_it_is_kept(capsys):
    main(["compile", "--parts", "live"])
    said = " ".join(capsys.readouterr().out.split())
    assert "kernels compiled" in said
    assert "live" in said
    assert "kept in" in said


def test_parts_are_compiled_in_several_processes(capsys):
    main(["compile", "--parts", "schedules", "live", "schedules", "--jobs", "2"])
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 2: " in said
    assert "2 of 2: " in said
    assert said.count("schedules,") == said.count("live,") == 1


def test_what_calls_the_kernels_of_dispatch_waits_for_them(monkeypatch):
    began, over = [], []

    def begins(part):
        began.append((part, tuple(over)))
        over.append(part)

    parts = ("tiers", "jobs", "dispatch", "live", "router")
    monkeypatch.setattr(
        compile_command, "PARTS", {part: functools.partial(begins, part) for part in parts}
    )
    with ThreadPoolExecutor(1) as pool:
        done = [compiled.part for compiled in compile_command.compile_parts(parts, pool)]
    assert sorted(done) == sorted(parts)
    before = dict(began)
    assert "dispatch" in before["tiers"]
    assert "dispatch" in before["router"]
    assert "router" in before["live"]
    assert not before["jobs"]


def test_no_processes_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["compile", "--jobs", "0"])
    assert end.value.code == 2
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err


def test_without_a_place_to_keep_kernels_it_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(compile_command, "places", lambda source: ([], None))
    with pytest.raises(SystemExit) as end:
        main(["compile", "--parts", "live"])
    assert end.value.code == 2
    assert "set NUMBA_CACHE_DIR to one that can" in capsys.readouterr().err
