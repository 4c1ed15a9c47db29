"""The command `servegym serve engine`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from servegym.errors import ConfigError
from servegym.scenario import load_scenario
from servegym.serve.engine.faults import Fault
from servegym.serve.until_told import kept_as_it_is, loop_factory, told_by_signals


@dataclass(frozen=True)
class ServeEngine:
    """Emulate engines: OpenAI's endpoints, dummy tokens, the simulator's timing, their metrics."""

    scenario: str = "mixed-chat"
    """Bundled scenario name or YAML file; gives replicas, model and output lengths."""
    replica: str = "all"
    """Index of the replica to serve, several with commas, or `all`."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8100
    """Port of the first replica; the others follow. 0 takes free ones."""
    admin_port: int | None = None
    """Loopback port for faults on command (`POST /faults`) and `GET /state`; 0 takes a free one."""
    speed: float = 1.0
    """Seconds of the engines' clocks in one real second."""
    stream_interval: int = 1
    """Tokens in one event of a stream, as vLLM's flag."""
    seed: int = 0
    """Of the replicas (where the scenario draws them) and of step noise."""
    model_name: str | None = None
    """As clients must name it; the scenario's model by default."""
    faults: tuple[str, ...] = ()
    """SECONDS:REPLICA:KIND, such as `30:0:slow=10 60:0:recover`; kinds are slow=FACTOR, hang, fail,
    drain, metrics-off, metrics-frozen and recover."""
    stamped: bool = False
    """Write into each event of a stream, as a comment, the machine's monotonic clock when it was
    sent and when the request came: the delay of what lies between can be measured."""

    def run(self) -> None:
        """Emulate the engines until the program is interrupted."""
        try:
            from servegym.serve.engine.fleet import Fleet, FleetConfig
        except ModuleNotFoundError as error:
            raise ConfigError(f"serving needs {error.name}: pip install {error.name}") from error
        config = FleetConfig(
            scenario=load_scenario(self.scenario),
            replicas=_indices(self.replica),
            host=self.host,
            port=self.port,
            admin_port=self.admin_port,
            speed=self.speed,
            stream_interval=self.stream_interval,
            seed=self.seed,
            model_name=self.model_name,
            faults=tuple(Fault.parse(text) for text in self.faults),
            stamped=self.stamped,
        )
        fleet = Fleet(config)

        async def serve() -> None:
            stop = asyncio.Event()
            with told_by_signals(stop.set):
                await fleet.start()
                for index, server in fleet.servers.items():
                    print(f"replica {index} {server.kind_name}: {server.url}", flush=True)
                if fleet.admin_url:
                    print(f"faults: {fleet.admin_url}", flush=True)
                with kept_as_it_is():
                    await stop.wait()
                await fleet.stop()

        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve())


def _indices(text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(f"--replica is an index, such as 0 or 0,2, or all, got {text}") from None
