"""Predict with the simulator what real vLLM servers behind the router then do.

    python sim_to_live.py VLLM_PYTHON MODEL WORK [--chat | --short-kv] [--repeats 2]

Three servers on this machine: vLLM's own server, scheduler and KV cache manager, but steps that
last what the cost grids of three GPUs say, `TIME_SCALE` times as long so that the processor is
mostly idle. What the simulator knows of them comes from their step logs alone, through `servegym
calibrate engine`. Then the same requests are played under several dispatch policies, in the
simulator and live behind `servegym serve router`. With `--chat` these are turns of conversations,
each sent when the one before is answered, and the servers cache prefixes; with `--short-kv` the
servers hold the KV of a handful of requests, and the router may hold requests back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import yaml
from cases import (
    ALONE,
    CHAT,
    MODEL,
    SHORT_KV,
    SLO_CLASSES,
    TIME_SCALE,
    Case,
    body,
    calibration_load,
)
from client import Answer, play
from conversations import prompts
from replicas import Replica, free_port

from servegym.assets.specs import gpu, model
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.costs.step import StepCost
from servegym.evaluate.tune import resolve
from servegym.export.resolve import resolve_policy
from servegym.policy.run import run
from servegym.problems.problem import AnyProblem
from servegym.problems.registry import load_problem
from servegym.scenario import Scenario
from servegym.serve.vllm.grid_file import save_grid

GPUS = ("H100-SXM-80GB", "A100-SXM-80GB", "L40S")
FIRST_SEED = 2_000_000
#: What `servegym train` writes, a network or what has none.
EXPORTED = ("policy.onnx", "policy.npz")
COMMAND = str(Path(sys.executable).with_name("servegym"))


async def calibrate(case: Case, fleet: dict[str, Replica], work: Path) -> dict[str, Path]:
    """Load each server by itself and fit its costs to its step log."""
    bodies, due_s = calibration_load(case)
    await asyncio.gather(*(play(r.url, bodies, due_s) for r in fleet.values()))
    calibrations = {}
    for name in fleet:
        path = work / f"{name}.calibration.json"
        servegym("calibrate", "engine", "--log", str(work / f"{name}.steps.csv"), "--model", MODEL,
                 "--gpu", name, "--out", str(path), log=work / f"{name}.calibrate.log")  # fmt: skip
        calibrations[name] = path
    return calibrations


def servegym(*arguments: str, log: Path) -> None:
    """Run a command of servegym."""
    with log.open("w") as file:
        subprocess.run([COMMAND, *arguments], check=True, stdout=file, stderr=file)


def simulate(scenario: Scenario, episode: Episode, policy: str) -> dict[str, np.ndarray]:
    """Play an episode in the simulator."""
    simulator = Simulator(scenario.spec, [episode])
    run(simulator, resolve_policy(policy))
    outcomes = simulator.outcomes(0)
    return {
        "ttft_s": outcomes["first_token_s"] - outcomes["arrival_s"],
        "e2e_s": outcomes["finish_s"] - outcomes["arrival_s"],
        "cached_tokens": outcomes["cached_tokens"],
    }


def router_file(case: Case, work: Path, fleet: dict[str, Replica], calibrations: dict[str, Path],
                policy: str, mean_tokens: float, port: int) -> Path:  # fmt: skip
    """Write the router's file."""
    size = case.size
    config = {
        "listen": {"port": port, "admin_port": free_port()},
        "replicas": [
            {
                "name": name,
                "url": replica.url,
                "hardware": {
                    "gpu": name,
                    "model": MODEL,
                    "calibration": str(calibrations[name]),
                    "max_num_seqs": size.max_num_seqs,
                    "max_num_batched_tokens": size.max_num_batched_tokens,
                    "kv_capacity_tokens": size.num_blocks * size.block_size,
                },
            }
            for name, replica in fleet.items()
        ],
        "dispatch": {
            "runtime": {"policy": policy},
            "slo_classes": SLO_CLASSES,
            "allow_hold": case.holds,
            "prefix": {"block_tokens": size.block_size},
            # few answers are known at first, and the simulator knows the mean from the start
            "prediction": {"kind": "max-tokens"}
            if case.states_bounds
            else {"kind": "mean", "initial_tokens": mean_tokens, "weight": 0.001},
            "log": {"folder": str(work / "decisions")},
        },
        "metrics": {"interval_s": 0.25},
        "request": {"hold_s": case.hold_s, "max_hold_s": 600.0},
    }
    path = work / "router.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Router:
    """`servegym serve router` as a process of its own."""

    def __init__(self, config: Path, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [COMMAND, "serve", "router", "--config", str(config)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    async def ready(self) -> None:
        """Wait until it answers."""
        async with aiohttp.ClientSession() as session:
            for _ in range(120):
                if self._process.poll() is not None:
                    break
                try:
                    async with session.get(f"{self.url}/health") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(1.0)
        raise RuntimeError(f"the router did not start: see {self._log.name}")

    async def decisions(self) -> str:
        """Its metrics page."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/metrics") as response,
        ):
            return await response.text()

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        self._log.close()


def latencies(answers: list[Answer], episode: Episode) -> dict[str, np.ndarray]:
    """Check that nothing was lost or cut, and return latencies from the due times."""
    wrong = [a.error for a in answers if a.error]
    if wrong:
        raise RuntimeError(f"{len(wrong)} requests failed: {wrong[0]}")
    got = np.array([a.output_tokens for a in answers])
    if (got != episode.table.output_tokens).any():
        raise RuntimeError("some answers have another length than asked for")
    due = np.array([a.due_s for a in answers])
    return {
        "ttft_s": np.array([a.first_token_s for a in answers]) - due,
        "e2e_s": np.array([a.end_s for a in answers]) - due,
        "sent_late_s": np.array([a.sent_s for a in answers]) - due,
        "cached_tokens": np.array([a.cached_tokens for a in answers]),
    }


def summary(values: np.ndarray) -> dict[str, float]:
    """Mean, median and 99th percentile."""
    p50, p99 = np.percentile(values, (50, 99))
    return {"mean": float(values.mean()), "p50": float(p50), "p99": float(p99)}


async def main() -> None:
    """Measure everything and write `result.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("vllm_python", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=4.0, help="of training")
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=2, help="episodes per policy")
    parser.add_argument("--rate", type=float, help="requests per second, if not the case's")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--chat", action="store_true", help="conversations")
    which.add_argument("--short-kv", action="store_true", help="few KV blocks; requests are held")
    parser.add_argument("--learner", help="what trains `trained`, if not the case's")
    parser.add_argument("--overlapped", action="store_true", help="async scheduling")
    parser.add_argument("--policies", nargs="*", help="rules, policies, `trained`")
    args = parser.parse_args()
    case = CHAT if args.chat else SHORT_KV if args.short_kv else ALONE
    args.rate = args.rate or case.rate_rps
    args.policies = args.policies or [*case.rules, "trained"]
    work: Path = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    fleet = {}
    for name in GPUS:
        grid = work / f"{name}.npz"
        cost = StepCost(gpu(name), model(MODEL), 1)
        save_grid(cost.compile(max_tokens=case.size.max_num_batched_tokens), grid)
        plugin = {"policy": "fcfs", "step_log": str(work / f"{name}.steps.csv"),
                  "stats_file": str(work / f"{name}.stats.json")}  # fmt: skip
        fleet[name] = Replica(
            args.vllm_python, args.model.resolve(), work, name,
            case.size,
            plugin=plugin, grid=grid, time_scale=TIME_SCALE, overlapped=args.overlapped,
        )  # fmt: skip
    try:
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(replica.ready(session) for replica in fleet.values()))
        result = await measure(case, args, work, fleet)
    finally:
        for replica in fleet.values():
            replica.stop()
    late = np.concatenate([np.load(r.lateness_file) for r in fleet.values()])
    result["step_lateness_s"] = summary(late) | {"steps": len(late)}
    result["plugin"] = {
        name: json.loads((work / f"{name}.stats.json").read_text()) for name in fleet
    }
    write_result(result, work / "result.json")
    print_table(result)


def tuned(problem: AnyProblem, scenario: Scenario, name: str) -> str:
    """Return a rule with its parameters; `NAME:tuned` is tuned on training seeds."""
    text: str = resolve(problem, scenario, name, [0.9, 1.1], scenario.num_requests).name
    return text


def training_options(
    case: Case, problem: AnyProblem, scenario: Scenario, learner: str | None
) -> list[str]:
    """Return what `servegym train` is told beside scenario, time and folder."""
    options = list(case.training)
    for i, word in enumerate(options):
        if word.startswith("{"):
            name, _, rest = word[1:].partition("}")
            options[i] = tuned(problem, scenario, name) + rest
    return [*options, *(["--learner", learner] if learner else [])]


async def measure(
    case: Case, args: argparse.Namespace, work: Path, fleet: dict[str, Replica]
) -> dict[str, Any]:
    """Calibrate, train, then play every policy in the simulator and live."""
    calibrations = {name: work / f"{name}.calibration.json" for name in fleet}
    if not all(path.exists() for path in calibrations.values()):
        calibrations = await calibrate(case, fleet, work)
    scenario_path = work / "scenario.yaml"
    scenario_path.write_text(yaml.safe_dump(case.scenario(calibrations, args.rate)))
    problem, scenario = load_problem(str(scenario_path))
    trained = work / "trained" / "policy"
    if "trained" in args.policies and not trained.exists():
        servegym("train", "--scenario", str(scenario_path), "--out", str(work / "trained"),
                 "--minutes", str(args.minutes),
                 *training_options(case, problem, scenario, args.learner),
                 log=work / "train.log")  # fmt: skip
    texts = {name: tuned(problem, scenario, name) for name in args.policies if name != "trained"}
    if "trained" in args.policies:
        (texts["trained"],) = (str(p) for p in trained.iterdir() if p.name in EXPORTED)
    mean_tokens = float(scenario.episode(0).table.output_tokens.mean())
    result: dict[str, Any] = {
        "scenario": case.scenario({n: Path(p.name) for n, p in calibrations.items()}, args.rate),
        "rules": {name: text for name, text in texts.items() if name != "trained"},
        "time_scale": TIME_SCALE,
        "overlapped": args.overlapped,
        "calibrations": {n: json.loads(p.read_text())["content"] for n, p in calibrations.items()},
        "load_average_at_start": os.getloadavg()[0],
        "runs": [],
    }
    for repeat in range(args.repeats):
        episode = scenario.episode(FIRST_SEED + repeat, num_requests=args.requests)
        stated = case.stated(episode.table)
        told = np.full(args.requests, max(mean_tokens, 1.0))
        if case.states_bounds:
            told = stated.astype(np.float64)
        table = replace(episode.table, predicted_output_tokens=told)
        episode = replace(episode, table=table)
        for policy in args.policies:
            text = texts[policy]
            predicted = simulate(scenario, episode, text)
            # other words each time: the servers remember those of the policy before
            bodies = [
                body(words, int(output), int(most))
                for words, output, most in zip(
                    prompts(table, len(result["runs"])), table.output_tokens, stated, strict=True
                )
            ]
            port = free_port()
            config = router_file(case, work, fleet, calibrations, text, mean_tokens, port)
            router = Router(config, port, work / f"router-{policy}-{repeat}.log")
            try:
                await router.ready()
                answers = await play(
                    router.url, bodies, table.arrival_s.tolist(),
                    after=table.after.tolist(), delay_s=table.delay_s.tolist(),
                )  # fmt: skip
                (work / f"router-{policy}-{repeat}.metrics").write_text(await router.decisions())
            finally:
                router.stop()
            seen = latencies(answers, episode)
            row = {
                "policy": policy,
                "repeat": repeat,
                "load_average": os.getloadavg()[0],
                "sent_late_s": summary(seen["sent_late_s"]),
                "simulated": {k: summary(predicted[k]) for k in ("ttft_s", "e2e_s")},
                "live": {k: summary(seen[k]) for k in ("ttft_s", "e2e_s")},
                "cached_share": [
                    float(side["cached_tokens"].sum() / table.prompt_tokens.sum())
                    for side in (predicted, seen)
                ],
                "each": {
                    "simulated_e2e_s": predicted["e2e_s"].round(4).tolist(),
                    "live_e2e_s": seen["e2e_s"].round(4).tolist(),
                    "simulated_cached_tokens": predicted["cached_tokens"].tolist(),
                    "live_cached_tokens": seen["cached_tokens"].tolist(),
                },
            }
            result["runs"].append(row)
            print_row(row)
    return result


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result, one run a line."""
    head = json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1)
    runs = ",\n".join(json.dumps(row, separators=(",", ":")) for row in result["runs"])
    path.write_text(f'{head[:-2]},\n "runs": [\n{runs}\n]}}\n')


def print_row(row: dict[str, Any]) -> None:
    """Print one run."""
    cells = [f"{row['policy']:18} {row['repeat']}"]
    for kind in ("ttft_s", "e2e_s"):
        for which in ("mean", "p50", "p99"):
            simulated, live = row["simulated"][kind][which], row["live"][kind][which]
            cells.append(f"{simulated:6.2f} {live:6.2f} ({100 * (simulated / live - 1):+5.1f} %)")
    cached = "cached {:.1%} {:.1%}".format(*row["cached_share"])
    print(" | ".join(cells), f"| {cached} | load {row['load_average']:.1f}", flush=True)


def print_table(result: dict[str, Any]) -> None:
    """Print means over the repeats, and what they say."""
    print("\nmean over the repeats: simulated, live, simulated / live - 1")
    for policy in dict.fromkeys(row["policy"] for row in result["runs"]):
        rows = [row for row in result["runs"] if row["policy"] == policy]
        cells = []
        for kind in ("ttft_s", "e2e_s"):
            for which in ("mean", "p50", "p99"):
                simulated, live = (
                    float(np.mean([row[side][kind][which] for row in rows]))
                    for side in ("simulated", "live")
                )
                cells.append(f"{simulated:.2f} {live:.2f} {100 * (simulated / live - 1):+.1f} %")
        print(f"| {policy} | " + " | ".join(cells) + " |")
    for repeat in sorted({row["repeat"] for row in result["runs"]}):
        rows = [row for row in result["runs"] if row["repeat"] == repeat]
        print_ranking(repeat, rows)
    late = result["step_lateness_s"]
    print(f"steps end {1e3 * late['p50']:.1f} ms (p50), {1e3 * late['p99']:.1f} ms (p99) late")


def print_ranking(repeat: int, rows: list[dict[str, Any]]) -> None:
    """Print who is how good in one episode, in the simulator and live."""
    sides = {}
    for side in ("simulated", "live"):
        mean_s = {row["policy"]: row[side]["e2e_s"]["mean"] for row in rows}
        ranking = sorted(mean_s, key=mean_s.__getitem__)
        sides[side] = ranking
        print(f"episode {repeat}, {side}: {' < '.join(ranking)}")
        if "trained" in mean_s:
            best_rule = next(name for name in ranking if name != "trained")
            print(f"trained / {best_rule}: {mean_s['trained'] / mean_s[best_rule]:.3f}")
    same = "the same" if sides["simulated"] == sides["live"] else "another"
    print(f"episode {repeat}: {same} ranking")


if __name__ == "__main__":
    asyncio.run(main())
