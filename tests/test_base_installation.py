"""What works with the dependencies alone, none of the extras: each command says what it lacks."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from servegym.cli import COMMANDS

ROOT = Path(__file__).parents[1]

#: Packages of extras by the name under which they are imported.
IMPORTED_AS = {
    "aiconfigurator-core": "aiconfigurator_core",
    "stable-baselines3": "stable_baselines3",
    "sb3-contrib": "sb3_contrib",
    "pillow": "PIL",
    "ray[rllib]": "ray",
    "mlflow-skinny": "mlflow",
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "protobuf": "google",
    "prometheus-client": "prometheus_client",
    "opentelemetry-sdk": "opentelemetry",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry",
}

ALONE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        blocked = name.split(".")[0] in BLOCKED
        return None if blocked else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from servegym.cli import main
main(sys.argv[1:])
"""


def extras() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for name, packages in project["optional-dependencies"].items():
        if name != "dev":
            found += [p.split(">")[0].split("<")[0].split(";")[0].strip() for p in packages]
    return sorted({IMPORTED_AS.get(name, name) for name in found})


def alone(*words, cwd=None):
    program = f"BLOCKED = {extras()!r}\n{ALONE}"
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_extras_are_known_by_the_names_they_are_imported_under():
    assert {"torch", "tensorboard", "aiohttp", "onnxruntime", "pyarrow"} <= set(extras())


def test_help_of_every_command_needs_no_extra():
    ran = alone("--help")
    assert ran.returncode == 0, ran.stderr
    assert all(name in ran.stdout for name in COMMANDS)


def test_rules_are_compared_without_any_extra():
    words = ["--policies", "least-outstanding", "--seeds", "1", "--loads", "0.5"]
    ran = alone("evaluate", *words, "--num-requests", "40")
    assert ran.returncode == 0, ran.stderr
    assert "least-outstanding" in ran.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--minutes", "1"], "training needs t"),
        (["train", "--scenario", "kv-starved"], "training needs t"),
        (["demo"], "training needs t"),
        (["serve", "router", "--config", str(ROOT / "examples" / "router.yaml")], "aiohttp"),
        (
            ["serve", "picker", "--config", str(ROOT / "examples" / "picker.yaml")],
            "an endpoint picker needs aiohttp",
        ),
    ],
    ids=lambda x: " ".join(x[:3]) if isinstance(x, list) else "",
)
def test_what_needs_an_extra_says_so_in_one_sentence(words, sentence, tmp_path):
    ran = alone(*words, cwd=tmp_path)
    assert ran.returncode == 2, ran.stderr
    assert "Traceback" not in ran.stderr
    assert sentence in ran.stderr
