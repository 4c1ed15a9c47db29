"""vLLM without a model: everything is real but the steps, which take the time a cost model says.

    python -m vllm.entrypoints.openai.api_server --model MODEL --load-format dummy \
        --distributed-executor-backend servegym.serve.vllm.PacedExecutor \
        --additional-config '{"servegym_paced": {"grid": "grid.npz"}}'

See docs/live-vllm.md.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from servegym.serve.vllm.grid_file import load_grid
from servegym.serve.vllm.pacing import Pacer, Step, StepReader, read_paced_config
from servegym.serve.vllm.versions import require_known


@cache
def make_executor() -> type:
    """Make the class that vLLM's `--distributed-executor-backend` names.

    Raises:
        ConfigError: If this vLLM is not one that it was tried on.
    """
    import vllm  # type: ignore[import-not-found,unused-ignore]

    require_known(vllm.__version__)
    from vllm.v1.executor.abstract import (  # type: ignore[import-not-found,unused-ignore]
        Executor,
    )
    from vllm.v1.kv_cache_interface import (  # type: ignore[import-not-found,unused-ignore]
        FullAttentionSpec,
    )
    from vllm.v1.outputs import ModelRunnerOutput  # type: ignore[import-not-found,unused-ignore]
    from vllm.v1.worker.worker_base import (  # type: ignore[import-not-found,unused-ignore]
        record_kv_cache_layout,
    )

    def to_output(step: Step) -> Any:
        return ModelRunnerOutput(
            req_ids=step.names,
            req_id_to_index={name: i for i, name in enumerate(step.names)},
            sampled_token_ids=step.sampled,
        )

    class PacedExecutor(Executor):  # type: ignore[misc,unused-ignore]
        """Runs no model: waits as long as a step would take, and returns made-up tokens."""

        uses_ray = False
        supports_pp = False

        def _init_executor(self) -> None:
            self._config = read_paced_config(self.vllm_config.additional_config)
            grid = load_grid(self._config.grid)
            self._reader = StepReader(grid, self.model_config.get_vocab_size())
            self._pacer = Pacer(self._config.time_scale)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="paced")
            self._step: Future[Any] | None = None
            atexit.register(self._write_lateness)

        def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
            """Begin a step; its tokens come from `sample_tokens`."""
            step = self._reader.read(scheduler_output)
            output = None
            if step.names:
                end_s = self._pacer.begin(step.duration_s)
                self._step = self._thread.submit(self._finish, step, end_s)
            else:
                output = to_output(step)
            return _done(output) if non_block else output

        def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
            """Return the tokens of the step begun last, when it ends."""
            step, self._step = self._step, None
            assert step is not None
            return step if non_block else step.result()

        def _finish(self, step: Step, end_s: float) -> Any:
            self._pacer.finish(end_s)
            return to_output(step)

        def get_kv_cache_specs(self) -> list[dict[str, Any]]:
            """Describe the KV cache that the model would have."""
            model, parallel = self.model_config, self.parallel_config
            spec = FullAttentionSpec(
                block_size=self.cache_config.block_size,
                num_kv_heads=model.get_num_kv_heads(parallel),
                head_size=model.get_head_size(),
                dtype=model.dtype,
            )
            layers = range(model.get_num_layers(parallel))
            return [{f"model.layers.{i}.self_attn.attn": spec for i in layers}]

        def get_supported_kv_cache_layouts(self) -> list[list[str]]:
            """Name any layout: nothing is stored."""
            return [["LBHNC"]]

        def set_kv_cache_layout(self, layout_name: str) -> None:
            """Take note of the layout, as a worker would."""
            record_kv_cache_layout(self.cache_config, layout_name)

        def determine_available_memory(self) -> list[int]:
            """Say that there is plenty; `--num-gpu-blocks-override` sets the size."""
            return [1 << 40]

        def initialize_from_config(self, kv_cache_configs: Any) -> None:
            """Allocate no KV cache: nothing is computed."""

        def compile_or_warm_up_model(self) -> None:
            """Compile nothing: there is no model."""

        @property
        def supported_tasks(self) -> tuple[str, ...]:
            """Name the one task there is, to generate text."""
            return ("generate",)

        def supports_draft_weight_updates(self) -> bool:
            """No: there are no weights."""
            return False

        def take_draft_token_ids(self) -> None:
            """Return none: nothing is drafted."""

        def collective_rpc(
            self,
            method: str | Callable[..., Any],
            timeout: float | None = None,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
            non_block: bool = False,
            single_value: bool = False,
        ) -> Any:
            """Answer nothing: there are no workers."""
            return None if single_value else [None]

        def check_health(self) -> None:
            """Raise nothing: a thread that sleeps does not fall ill."""

        def shutdown(self) -> None:
            """Finish the step that is under way."""
            self._thread.shutdown(wait=False)
            self._write_lateness()

        def _write_lateness(self) -> None:
            atexit.unregister(self._write_lateness)
            if self._config.lateness_file is not None:
                with self._config.lateness_file.open("wb") as file:
                    np.save(file, self._pacer.lateness_s())

        @classmethod
        def supports_async_scheduling(cls) -> bool:
            """Steps may be formed while the one before runs."""
            return True

    # vLLM sends the class to its engine process by name
    PacedExecutor.__module__, PacedExecutor.__qualname__ = __package__, "PacedExecutor"
    return PacedExecutor


def _done(output: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(output)
    return future
