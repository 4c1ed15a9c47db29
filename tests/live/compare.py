"""Print what runs of `play.py` and `through_server.py` show; fail if it is not as it should be.

python compare.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def compare(folder: Path) -> list[str]:
    """Print the table; return what is wrong."""
    runs = {p.stem.removeprefix("run-"): read(p) for p in sorted(folder.glob("run-*.json"))}
    stock = runs["stock"]
    wrong = []
    print(
        "| order | same tokens as FCFS | victims as the policy says | unlike FCFS "
        "| admissions as the policy says | unlike FCFS | most waiting | mean E2E, steps |"
    )
    for name, run in runs.items():
        same = sum(run["tokens"].get(key) == tokens for key, tokens in stock["tokens"].items())
        cells = [f"{same} / {len(stock['tokens'])}"]
        if same < len(stock["tokens"]) or run.get("left") or run.get("errors"):
            wrong.append(f"{name}: {same} of {len(stock['tokens'])} requests have FCFS's tokens")
        told, plugin = run.get("checked"), run.get("plugin")
        if told:
            bad_victims = sum("preempted" in text for text in told["wrong"])
            cells += [
                f"{told['preemptions'] - bad_victims} / {told['preemptions']}",
                str(told["preemptions_unlike_fcfs"]),
                f"{told['admissions'] - len(told['wrong']) + bad_victims} / {told['admissions']}",
                str(told["admissions_unlike_fcfs"]),
                str(told["max_waiting"]),
            ]
            wrong += [f"{name}: {text}" for text in told["wrong"]]
            if not told["preemptions_unlike_fcfs"] or not told["admissions_unlike_fcfs"]:
                wrong.append(f"{name}: nothing was decided otherwise than by FCFS")
        elif plugin:
            cells += [
                f"{plugin['num_preempted_agreed']} / {plugin['num_preempted']}",
                "-",
                f"{plugin['num_admitted_agreed']} / {plugin['num_admitted']}",
                *("-", "-"),
            ]
            if plugin["num_preempted_agreed"] < plugin["num_preempted"]:
                wrong.append(f"{name}: vLLM preempted others than the policy's")
        else:
            cells += ["-"] * 5
        if plugin and (plugin["num_faults"] or plugin["num_fallback_steps"]):
            wrong.append(f"{name}: the policy failed {plugin['num_faults']} times")
        steps = run.get("mean_e2e_steps")
        print(f"| {name} | {' | '.join(cells)} | {f'{steps:.0f}' if steps else '-'} |")
    times = [run["compute_s"] for name, run in runs.items() if name.startswith("stock")]
    print(
        f"\nthe same {stock['num_steps']} steps of stock vLLM took "
        f"{' and '.join(f'{t:.1f} s' for t in times)}: the machine's speed is no constant"
    )
    print("\n| order | plug-in p50, p99 us | vLLM's schedule() p50, p99 us | asked in steps |")
    for path in sorted(folder.glob("overhead-*.json")):
        told = read(path)
        print(
            f"| {told['policy']} | {told['policy_p50_us']:.0f}, {told['policy_p99_us']:.0f} "
            f"| {told['engine_p50_us']:.0f}, {told['engine_p99_us']:.0f} "
            f"| {told['num_asked']} of {told['num_steps']} |"
        )
    return wrong


def read(path: Path) -> dict[str, Any]:
    """Read a run."""
    told: dict[str, Any] = json.loads(path.read_text())
    return told


if __name__ == "__main__":
    found = compare(Path(sys.argv[1]))
    sys.exit("\n".join(found) or 0)
