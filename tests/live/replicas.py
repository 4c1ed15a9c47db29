"""Real vLLM servers on this machine whose steps take as long as a cost model says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import aiohttp

SOURCE = Path(__file__).parents[2] / "src"
#: Quiet, offline, and one thread: nothing is computed.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "PYTHONPATH": str(SOURCE),
}


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class EngineSize:
    """What a server is started with; vLLM's names."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool = False


class Replica:
    """One server.

    Args:
        python: Interpreter of vLLM's environment.
        model: Folder of the tiny model: its tokenizer is used, its weights are not.
        folder: For logs.
        name: Of files in it.
        size: What it is started with.
        plugin: Settings of servegym's scheduler.
        grid: What a step costs; without one the model is computed.
        time_scale: How many times as long a step takes.
        overlapped: Whether steps are formed while the one before runs.
    """

    def __init__(
        self,
        python: Path,
        model: Path,
        folder: Path,
        name: str,
        size: EngineSize,
        *,
        plugin: dict[str, object],
        grid: Path | None = None,
        time_scale: float = 1.0,
        overlapped: bool = False,
    ) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lateness_file = folder / f"{name}.lateness.npy"
        config: dict[str, object] = {"servegym": plugin}
        arguments = [
            *("--model", str(model), "--served-model-name", "tiny", "--dtype", "float32"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"),
            *("--block-size", str(size.block_size)),
            # one block more: vLLM keeps one for itself
            *("--num-gpu-blocks-override", str(size.num_blocks + 1)),
            *("--max-num-seqs", str(size.max_num_seqs)),
            *("--max-num-batched-tokens", str(size.max_num_batched_tokens)),
            *("--max-model-len", str(size.max_model_len), "--enable-prompt-tokens-details"),
            f"--{'' if size.enable_prefix_caching else 'no-'}enable-prefix-caching",
            *("--scheduling-policy", "priority"),
            "--async-scheduling" if overlapped else "--no-async-scheduling",
            "--scheduler-cls",
            f"servegym.serve.vllm.{'PolicyScheduler' if overlapped else 'PolicySyncScheduler'}",
        ]
        if grid is not None:
            config["servegym_paced"] = {
                "grid": str(grid),
                "time_scale": time_scale,
                "lateness_file": str(self.lateness_file),
            }
            arguments += ["--load-format", "dummy"]
            arguments += ["--distributed-executor-backend", "servegym.serve.vllm.PacedExecutor"]
        arguments += ["--additional-config", json.dumps(config)]
        self._log = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments],
            env=os.environ | ENVIRONMENT,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    async def ready(self, session: aiohttp.ClientSession, timeout_s: float = 300.0) -> None:
        """Wait until it answers."""
        for _ in range(int(timeout_s)):
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended: see {self._log.name}")
            try:
                async with session.get(f"{self.url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(1.0)
        raise RuntimeError(f"{self.name} did not answer in {timeout_s:.0f} s: see {self._log.name}")

    def stop(self) -> None:
        """End it, and what it started."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()
