"""`servegym train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from servegym.commands.console import make_console
from servegym.commands.sitting import sitting
from servegym.commands.train_ordering import train_order
from servegym.commands.train_workflow import JOB_SHOP, train_scheduler
from servegym.commands.workload import TRACE_OPTIONS, Played
from servegym.errors import ConfigError
from servegym.scenario import load_scenario
from servegym.workflow_scenario import is_workflow_scenario

if TYPE_CHECKING:
    from servegym.agents.network import DispatchNetwork
    from servegym.train.ppo import PPOConfig


def require_torch() -> None:
    """Say what to install if the training extra is missing."""
    try:
        import tensorboard  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"training needs {error.name}: pip install -e '.[train]' in a checkout of servegym"
        ) from error


@dataclass(frozen=True)
class Train(Played):
    """Train a PPO dispatcher and export it; a killed run goes on where its checkpoint is.

    For jobs, a scheduler; for one engine that goes by priorities, the order of its requests.
    """

    scenario: str = "mixed-chat"
    """Bundled scenario name or YAML file, of requests, of one engine or of jobs, or `job-shop`."""
    out: Path | None = None
    """Folder of the run: config.json, tensorboard/, checkpoint.pt, policy/. By default
    runs/KIND-SCENARIO, such as runs/ppo-mixed-chat. A folder is gone on with under the same
    configuration only."""
    decisions: int = 4_000_000
    """Dispatch decisions to train on."""
    minutes: float = float("inf")
    """Stop earlier after this wall-clock time, which counts from when all is compiled."""
    base: str | None = None
    """Rule the policy starts from, with its parameters: added-delay (default), prefix-load,
    speed-family or least-outstanding; for jobs none (default), srpt-cp, sjf-cp, edd or rank."""
    objective: Literal["", "jct", "makespan", "deadline"] = ""
    """For jobs, instead of the scenario's own."""
    num_jobs: tuple[int, int] | None = None
    """For jobs: range of the number of an episode."""
    imitate: str = ""
    """Policy to imitate before PPO begins, such as what-if-added."""
    context: Literal["mean", "attention"] = "mean"
    """How replicas see each other: mean or attention."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor, drawn per episode."""
    num_envs: int = 32
    """Environments stepped together."""
    seed: int = 0
    """Of everything."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to learn."""

    def run(self) -> None:
        """Train and export."""
        require_torch()
        if is_workflow_scenario(self.scenario) or self.scenario == JOB_SHOP:
            self._train_scheduler()
            return
        for option in ("objective", "num_jobs"):
            if getattr(self, option):
                raise ConfigError(
                    f"--{option.replace('_', '-')} is for scenarios of jobs, and {self.scenario}"
                    " is one of requests: leave it out"
                )
        orders = load_scenario(self.scenario).orders_requests
        out = self._folder("order" if orders else "ppo")
        scenario = self.chosen_file(out)
        if orders:
            self._train_order(scenario, out)
            return
        path = trained(
            out,
            base=self.base or "added-delay",
            context=self.context,
            imitate=self.imitate,
            scenario=scenario,
            total_decisions=self.decisions,
            max_minutes=self.minutes,
            load=self.load,
            num_envs=self.num_envs,
            seed=self.seed,
            device=self.device,
        )
        make_console().print(f"policy: {path}\ntensorboard --logdir {out}")

    def _folder(self, kind: str) -> Path:
        """Folder of the run: runs of different scenarios do not meet unless they are told to."""
        if self.out is not None:
            return self.out
        parts = [kind, Path(self.scenario).stem, *([Path(self.trace).stem] if self.trace else [])]
        parts += [] if self.wait_for_answers else ["open-loop"]
        return Path("runs") / "-".join(parts)

    def _train_order(self, scenario: str, out: Path) -> None:
        options = ("decisions", "base", "imitate", "context", "num_envs", "device")
        why = f"is for scenarios of several replicas, and {self.scenario} has one engine"
        self.refuse(options, why)
        path = train_order(
            out, minutes=self.minutes, scenario=scenario, load=self.load, seed=self.seed
        )
        make_console().print(f"order: {path}\ntensorboard --logdir {out}")

    def _train_scheduler(self) -> None:
        options = (*TRACE_OPTIONS, "decisions", "imitate", "context", "num_envs", "device")
        why = f"is for scenarios of requests, and {self.scenario} is one of jobs"
        self.refuse(("trace", *options), why)
        given = {} if self.num_jobs is None else {"num_jobs": self.num_jobs}
        out = self._folder("jobs")
        path = train_scheduler(
            out,
            base=self.base or "none",
            minutes=self.minutes,
            scenario=self.scenario,
            objective=self.objective,
            load=self.load,
            seed=self.seed,
            **given,
        )
        make_console().print(f"policy: {path}\ntensorboard --logdir {out}")


def trained(out: Path, *, base: str, context: str = "mean", **settings: Any) -> Path:
    """Train as `PPOConfig` says and export to `out/policy`; return the ONNX file."""
    from servegym.baselines.registry import policy
    from servegym.policy.costs import BASES
    from servegym.train.ppo import PPOConfig, Trainer

    rule = policy(base)
    name = base.partition(":")[0]
    if name not in BASES:
        raise ConfigError(f"base must be one of {', '.join(BASES)}, got {base!r}")
    config = PPOConfig(
        **settings,
        network=network_config(settings["scenario"], name, tuple(rule.params.tolist()), context),
    )
    trainer = Trainer(config, out)
    with sitting(trainer):
        network = trainer.run()
        return exported(network, config, out / "policy", trainer.update, trainer.last)


def network_config(scenario: str, base: str, params: tuple[float, ...], context: str) -> Any:
    """Shape of the network for a scenario's action space."""
    from servegym.agents.network import NetworkConfig

    actions = load_scenario(scenario).actions
    return NetworkConfig(
        base=base, base_params=params, context=context, num_extra=actions.hold + actions.reject
    )


def exported(
    network: DispatchNetwork, config: PPOConfig, folder: Path, update: int, last: dict[str, float]
) -> Path:
    """Export with observations from the training scenario to check against."""
    from servegym.export.from_torch import export_policy
    from servegym.export.sample import sample_observations

    samples = sample_observations(network, config.scenario, load=config.load)
    decisions = update * config.num_envs * config.num_steps
    training: dict[str, float | int | str] = {
        "algorithm": "ppo",
        "decisions": decisions,
        "seed": config.seed,
        "base": config.network.base,
        "mean_e2e_s": last.get("rollout/mean_e2e_s", 0.0),
    }
    return export_policy(network, folder, samples, scenario=config.scenario, training=training)
