"""The program: help that teaches, every command end to end, and one sentence for wrong input."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from servegym.baselines.registry import RULES
from servegym.cli import COMMANDS, main
from servegym.commands.train import Train
from servegym.scenario import load_scenario, scenario_names

SCENARIO = {
    "name": "tiny",
    "engine": {"block_size": 16, "max_num_seqs": 16},
    "fleet": [{"gpu": "H100-SXM-80GB"}, {"gpu": "L40S", "count": 2}],
    "workload": {
        "kind": "generated",
        "rate_rps": 30.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 1000},
        "output": {"medians_tokens": [30.0], "max_tokens": 100},
    },
    "num_requests": 60,
}
TINY = ["--scenario", "tiny.yaml", "--seeds", "2"]
#: One update, in case it is not refused.
SHORT_TRAIN = ["train", "--scenario", "tiny.yaml", "--decisions", "8192"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with a scenario, a trace and broken files of all kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SCENARIO))
    rows = (f"{0.05 * i},{100 + i % 7},{10 + i % 5}" for i in range(200))
    header = "arrival_s,prompt_tokens,output_tokens\n"
    (tmp_path / "trace.csv").write_text(header + "\n".join(rows) + "\n")
    (tmp_path / "bad.csv").write_text(header + "0.0,100,10\n0.1,many,10\n")
    (tmp_path / "long.csv").write_text(header + "0.0,100,10\n0.1,200000,10\n")
    (tmp_path / "wide.csv").write_text(header + "0.0,100,10\n0.1,1,000,10\n")
    (tmp_path / "batch.csv").write_text(header + "5.0,100,10\n" * 20)
    played = {"kind": "trace", "path": "long.csv"}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(SCENARIO | {"workload": played}))
    second = '{"timestamp": %s, "input_length": 40, "output_length": 5, "hash_ids": [%s, %s, 9]}\n'
    seconds = "".join(second % (i / 4, 2 * i, 2 * i + 1) for i in range(20))
    (tmp_path / "seconds.jsonl").write_text(seconds)
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "broken.yaml").write_text("name: [")
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(SCENARIO | {"num_request": 5}))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "policy.onnx").write_text("no graph")
    (tmp_path / "file").write_text("in the way of a folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_text("no checkpoint")
    (tmp_path / "run" / "config.json").write_text("{}")
    return tmp_path


def contents(place: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(place)): p.read_bytes() if p.is_file() else b"" for p in place.rglob("*")
    }


@pytest.fixture
def refused(place, capsys) -> Callable[..., str]:
    """Return a runner of wrong commands that returns the one sentence they end with."""

    def run(*words: str) -> str:
        before = contents(place)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(words)
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert said.startswith("servegym: ")
        assert said.endswith("\n")
        assert said.count("\n") == 1
        assert len(said) > 20
        assert "Traceback" not in said
        assert contents(place) == before  # nothing is half-written
        return said.strip()

    return run


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_program_runs_as_a_process():
    done = subprocess.run(
        [sys.executable, "-c", "from servegym.cli import main; main()", "simulate", "--seeds", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "servegym: seeds must be at least 1, got 0\n"


def test_help_names_every_command_and_the_first_steps(capsys):
    text = help_of(capsys)
    for name in COMMANDS:
        assert name in text
    for step in ("servegym evaluate --scenario mixed-chat", "servegym train --minutes 5"):
        assert step in " ".join(text.replace("│", " ").split())


def test_no_words_mean_help(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    assert "simulate" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_a_command_says_what_it_does_and_what_each_option_means(capsys, name):
    text = " ".join(help_of(capsys, name).replace("│", " ").split())
    command = COMMANDS[name]
    first = " ".join(command.__doc__.split())[:40]
    assert first in text
    # a field's sentence is the string below it in the class
    body = ast.parse(inspect.getsource(command)).body[0].body
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            sentence = " ".join(below.value.value.split())
            assert sentence[:30] in text, field.target.id


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("simulate", "Replay this trace instead"),
        ("evaluate", "Episodes per load, the same for every policy."),
        ("train", "Rule the policy starts from"),
        ("tune", "Parameter settings to try."),
        ("export", "by default `policy/` in the run's folder"),
        ("fit", "refuses the file at a malformed row"),
        ("costs", "Tensor-parallel degree."),
        ("demo", "Held-out episodes per load."),
    ],
)
def test_help_explains_an_option(capsys, name, words):
    assert words in " ".join(help_of(capsys, name).replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["simulat"], "unknown command 'simulat'.*did you mean simulate"),
        (["42"], "unknown command '42': choose one of bench, "),
        (["simulate", "--sceario", "tiny.yaml"], "--sceario"),
        (["simulate", "--seeds", "many"], "--seeds.*'many'"),
        (["simulate", "--load", "1,5"], "--load.*'1,5'"),
        (["simulate", "--seeds"], "--seeds"),
        (["simulate", *TINY, "--load", "1", "--load=2"], "--load is given 2 times: give it once"),
        (["evaluate", "--num_requests", "9", "--num-requests", "8"], "--num-requests is given 2"),
        (["simulate", "--scenario", "mixd-chat"], "unknown scenario.*did you mean mixed-chat"),
        (["simulate", "--scenario", "none.yaml"], "no scenario file at none.yaml"),
        (["simulate", "--scenario", "broken.yaml"], "broken.yaml.*not YAML"),
        (["simulate", "--scenario", "typo.yaml"], "did you mean num_requests"),
        (["simulate", "--scenario", "bytes.yaml"], "bytes.yaml"),
        (["simulate", "--policy", "prefix-lod"], "unknown policy.*did you mean prefix-load"),
        (["simulate", "--policy", "speed-family:mu=1"], "unknown parameter of speed-family 'mu'"),
        (["simulate", "--policy", "speed-family:eta=a"], "eta of speed-family must be a number"),
        (["simulate", "--policy", "speed-family:eta=nan"], "eta"),
        (["simulate", "--policy", "none.onnx"], "none.onnx must exist with a manifest.json"),
        (["simulate", "--policy", "policy.onnx"], "policy.onnx must exist with a manifest.json"),
        (["simulate", *TINY[:2], "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["simulate", *TINY, "--load", "0"], "load must be above 0"),
        (["simulate", *TINY, "--load", "nan"], "load must be above 0"),
        (["simulate", *TINY, "--load", "inf"], "load must be"),
        (["simulate", *TINY, "--num-requests", "0"], "num_requests must be at least 1, got 0"),
        (["simulate", *TINY, "--num-requests", "-3"], "num_requests must be at least 1, got -3"),
        (["simulate", "--trace", "none.csv"], "no trace at none.csv"),
        (["simulate", "--trace", "bad.csv"], "bad.csv, line 3, column prompt_tokens: 'many'"),
        (["simulate", "--trace", "columns.csv"], "columns.csv"),
        (["simulate", "--trace", "empty.csv"], "empty.csv has no usable request"),
        (["simulate", "--trace", "bytes.csv"], "bytes.csv"),
        (["simulate", "--trace", "list.jsonl"], "list.jsonl, line 1"),
        (["simulate", "--trace", "trace.csv", "--rate-rps", "-1"], "rate_rps must be above 0"),
        (["simulate", *TINY, "--rate-rps", "5"], "--rate-rps is for a trace, and none is given"),
        (["evaluate", *TINY, "--too-long", "cut"], "--too-long is for a trace, and none is given"),
        (["evaluate", "--scenario", "taillard", "--seeds", "3"], "--seeds has no meaning for job"),
        (["simulate", *TINY, "--trace", "long.csv"], "long.csv, line 3: .* 1 of 2 requests do, by"),
        (["evaluate", "--scenario", "long.yaml"], "long.csv, line 3: .* 1 of 2 requests do, by"),
        (["evaluate", *TINY, "--trace", "wide.csv"], "wide.csv, line 3: 4 fields, but the header"),
        (["fit", "seconds.jsonl"], "seconds.jsonl, line 1: .*--time-unit"),
        (
            ["evaluate", *TINY, "--trace", "batch.csv", "--saturation"],
            "batch.csv arrive at one time, so that there is no largest load",
        ),
        (["evaluate", *TINY, "--policies", "random", "random"], "its own name"),
        (["evaluate", *TINY, "--policies"], "polic"),
        (["evaluate", *TINY, "--loads"], "load"),
        (["evaluate", *TINY, "--loads", "1", "heavy"], "--loads.*heavy"),
        (["evaluate", *TINY, "--loads", "1", "1", "--policies", "random"], "load"),
        (["costs", "--gpu", "H10"], "unknown GPU 'H10'"),
        (["costs", "--model", "Lama"], "unknown model 'Lama'"),
        (["costs", "--tp", "0"], "tp must"),
        (["costs", "--context", "-5"], "context"),
        (["fit"], "Trace file"),
        (["fit", "none.csv"], "no trace at none.csv"),
        (["fit", "bad.csv"], "bad.csv, line 3, column prompt_tokens"),
        (["fit", "trace.csv", "--on-bad-row", "ignore"], "on.bad.row"),
        (["tune", "--policy", "random"], "unknown tunable policy 'random'"),
        (["tune", *TINY[:2], "--seeds", "0", "--budget", "2"], "seeds must be at least 1, got 0"),
        (["tune", *TINY, "--budget", "0"], "budget must be at least 1, got 0"),
        (["tune", *TINY, "--loads"], "load"),
        (["train", "--base", "random"], "base must be one of"),
        (["train", "--base", "least-outstandin"], "did you mean least-outstanding"),
        ([*SHORT_TRAIN, "--context", "max"], "context"),
        ([*SHORT_TRAIN, "--imitate", "mct-oracle"], "cannot imitate mct-oracle"),
        ([*SHORT_TRAIN, "--imitate", "what-iff"], "unknown policy.*did you mean what-if"),
        (["train", "--scenario", "none.yaml"], "no scenario file at none.yaml"),
        (["train", "--rate-rps", "3"], "--rate-rps is for a trace, and none is given"),
        (["train", "--scenario", "text-to-sql", "--too-long", "cut"], "--too-long is for scenario"),
        ([*SHORT_TRAIN, "--trace", "long.csv"], "long.csv, line 3: .* 1 of 2 requests do, by"),
        (["demo", "--too-long", "cut"], "--too-long is for a trace, and none is given"),
        (["demo", "--trace", "none.csv"], "no trace at none.csv"),
        (["train", "--decisions", "10"], "total_decisions must be at least"),
        ([*SHORT_TRAIN, "--num-envs", "6"], r"num_envs \(6\) must be a multiple of group_size"),
        ([*SHORT_TRAIN, "--num-envs", "0"], "num_envs.* must be at least 1"),
        ([*SHORT_TRAIN, "--device", "tpu"], "device"),
        ([*SHORT_TRAIN, "--minutes", "0"], "minutes"),
        ([*SHORT_TRAIN, "--minutes", "-1"], "minutes"),
        ([*SHORT_TRAIN, "--minutes", "nan"], "minutes"),
        ([*SHORT_TRAIN, "--out", "file"], "file"),
        (["export"], "run-folder"),
        (["export", "--run-folder", "nowhere"], "nowhere is no training run"),
        (["export", "--run-folder", "folder"], "folder is no training run"),
        (["export", "--run-folder", "run"], "run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_ends_with_one_sentence(refused, words, sentence):
    assert re.search(sentence, refused(*words))


@pytest.mark.parametrize(
    "words", [["simulate", "--nope", "1"], ["simulate", "--seeds", "x"], ["fit"]]
)
def test_sentence_about_options_has_no_ruled_lines(refused, words):
    assert "---" not in refused(*words).replace("--nope", "").replace("--seeds", "")


@pytest.mark.parametrize(
    ("option", "target"),
    [
        ("--json", "file/result.json"),
        ("--json", "folder"),
        ("--report", "file/report.html"),
        ("--report", "folder"),
    ],
)
def test_unwritable_output_is_refused(refused, option, target):
    # both are asked for: neither may be left behind without the other
    words = ["evaluate", *TINY, "--loads", "1", "--policies", "random"]
    other = ("--report", "r.html") if option == "--json" else ("--json", "r.json")
    assert target.partition("/")[0] in refused(*words, option, target, *other)


@pytest.mark.parametrize("command", ["policies", "scenarios", "costs"])
def test_lists_name_everything(place, capsys, command):
    main([command])
    shown = capsys.readouterr()
    assert shown.err == ""
    for name in {"policies": RULES.names(), "scenarios": scenario_names(), "costs": ["H100"]}[
        command
    ]:
        assert name in shown.out


def test_costs_grow_with_the_context(place, capsys):
    def step_costs(context: str) -> str:
        main(["costs", "--gpu", "L40S", "--context", context])
        return capsys.readouterr().out

    assert step_costs("1024") != step_costs("16384")
    assert "L40S" in step_costs("1024")


def test_simulate_prints_metrics_and_costs(place, capsys):
    main(["simulate", *TINY, "--policy", "speed-family:eta=0.5", "--explain"])
    text = capsys.readouterr().out
    assert "speed-family:eta=0.5 on tiny, load 1" in text
    for word in ("ttft_mean_s", "goodput_rps", "prefix_hit_rate", "H100-SXM-80GB", "L40S"):
        assert word in text


def test_simulate_is_the_same_twice_and_depends_on_the_load(place, capsys):
    def said(*more: str) -> str:
        main(["simulate", *TINY, "--policy", "random", *more])
        return capsys.readouterr().out

    assert said() == said()
    assert said() != said("--load", "2")


def test_simulate_replays_a_trace(place, capsys):
    main(["simulate", *TINY, "--trace", "trace.csv", "--num-requests", "50"])
    assert "prefix-load on tiny + trace.csv" in capsys.readouterr().out


def test_evaluate_prints_a_table_and_writes_json_and_report(place, capsys):
    pytest.importorskip("matplotlib")
    main(
        [
            *("evaluate", *TINY, "--loads", "0.5", "1", "--policies", "random", "mct-oracle"),
            *("--json", "out/result.json", "--report", "out/report.html", "--saturation"),
        ]
    )
    text = capsys.readouterr().out
    for word in ("tiny, load 0.5", "tiny, load 1", "oracle", "largest load", "out/result.json"):
        assert word in text
    document = json.loads((place / "out" / "result.json").read_text())
    assert document["loads"] == [0.5, 1.0]
    assert len(document["runs"]) == 2 * 2 * 2
    assert set(document["saturation_load"]) == {"random", "mct-oracle"}
    assert document["scenario"]["name"] == "tiny"
    assert (place / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_json_differs_between_runs_only_in_times(place, capsys):
    def document(path: str) -> dict[str, object]:
        words = ["evaluate", *TINY, "--loads", "1", "--policies", "random", "round-robin"]
        main([*words, "--json", path])
        made = json.loads(Path(path).read_text())
        return {k: v for k, v in made.items() if k not in ("decision_s", "command")}

    assert document("a.json") == document("b.json")


def test_fit_prints_a_workload_that_a_scenario_can_use(place, capsys):
    main(["fit", "trace.csv"])
    text = capsys.readouterr().out
    assert "200 requests, 20/s" in text  # one each 0.05 s
    workload = yaml.safe_load(text[text.index("workload:") : text.index("trace.csv")].strip())
    (place / "fitted.yaml").write_text(yaml.safe_dump(SCENARIO | workload))
    main(["simulate", "--scenario", "fitted.yaml", "--seeds", "1"])
    assert "ttft_mean_s" in capsys.readouterr().out


def test_fit_counts_the_rows_it_skips(place, capsys):
    good = (place / "trace.csv").read_text()
    (place / "mixed.csv").write_text(good + "x,1,1\n")
    main(["fit", "mixed.csv", "--on-bad-row", "skip"])
    assert "skipped 1 rows; the first: mixed.csv, line 202, column arrival_s" in " ".join(
        capsys.readouterr().out.split()
    )


def test_simulate_counts_the_rows_of_a_trace_it_skips(place, capsys):
    (place / "holes.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,many,5\n2,20,5\n3,30,0\n4,10,5\n"
    )
    words = ["simulate", "--scenario", "tiny.yaml", "--trace", "holes.csv", "--seeds", "1"]
    main([*words, "--on-bad-row", "skip"])
    assert "skipped 2 rows; the first: holes.csv, line 3, column prompt_tokens" in " ".join(
        capsys.readouterr().out.split()
    )


def test_runs_of_different_scenarios_have_different_folders_by_default():
    def folder(**settings) -> str:
        return str(Train(**settings)._folder("ppo"))

    assert folder() == "runs/ppo-mixed-chat"
    assert folder(scenario="tiny.yaml") == "runs/ppo-tiny"
    assert folder(scenario="tiny.yaml", trace="logs/monday.csv") == "runs/ppo-tiny-monday"
    assert folder(out=Path("mine")) == "mine"


def test_train_takes_the_options_of_a_trace(place, capsys):
    folder = place / "cut"
    path = Train(scenario="tiny.yaml", trace="long.csv", too_long="cut").chosen_file(folder)
    assert "1 of 2 requests" in capsys.readouterr().out
    assert path == str(folder / "scenario.yaml")
    workload = load_scenario(path).played_workload
    assert (workload.too_long, workload.path) == ("cut", str(place / "long.csv"))


def test_trace_of_another_run_is_refused_and_its_scenario_kept(place, refused):
    (place / "mine").mkdir()
    (place / "mine" / "scenario.yaml").write_text("name: other\n")
    words = [*SHORT_TRAIN, "--trace", "trace.csv", "--out", "mine"]
    assert "mine/scenario.yaml is another scenario than tiny + trace.csv" in refused(*words)


def test_tune_prints_the_best_of_its_budget(place, capsys):
    main(["tune", *TINY, "--policy", "speed-family", "--budget", "3"])
    text = capsys.readouterr().out
    assert text.strip().startswith("speed-family")
    assert "s on training seeds" in text


@pytest.mark.slow
def test_train_export_and_evaluate_a_policy(place, capsys):
    pytest.importorskip("torch")
    train = ["train", *TINY[:2], "--out", "runs/a", "--num-envs", "4", "--base", "speed-family"]
    main([*train, "--decisions", "2048"])
    assert "policy: runs/a/policy/policy.onnx" in capsys.readouterr().out
    run = place / "runs" / "a"
    assert {p.name for p in run.iterdir()} == {
        "checkpoint.pt",
        "config.json",
        "policy",
        "tensorboard",
    }
    manifest = json.loads((run / "policy" / "manifest.json").read_text())
    assert manifest["training"]["decisions"] == 2048
    assert manifest["training"]["base"] == "speed-family"
    assert manifest["scenario"] == "tiny.yaml"
    # the same command again trains no further; another one is refused
    first = (run / "policy" / "policy.onnx").read_bytes()
    main([*train, "--decisions", "2048"])
    said = " ".join(capsys.readouterr().out.split())
    assert "finished with this configuration: runs/a, after 2 updates" in said
    assert (run / "policy" / "policy.onnx").read_bytes() == first
    with pytest.raises(SystemExit) as end:
        main([*train, "--decisions", "3072"])
    assert end.value.code == 2
    assert "total_decisions is 2048 there, 3072 here" in capsys.readouterr().err
    main(["export", "--run-folder", "runs/a", "--out", "exported"])
    assert (place / "exported" / "policy.onnx").read_bytes() == first
    capsys.readouterr()
    words = ["evaluate", *TINY, "--loads", "1", "--json", "r.json"]
    main([*words, "--policies", "speed-family", "runs/a/policy/policy.onnx"])
    text = capsys.readouterr().out
    assert "speed-family" in text
    document = json.loads((place / "r.json").read_text())
    assert [a["policy"] for a in document["aggregates"]] == ["speed-family", "a"]
    ratio = document["aggregates"][1]["ratio"]
    assert ratio["reference"] == "speed-family"  # never a learned policy
    assert 0.5 < ratio["value"] < 2.0  # it began as that rule
    main(["simulate", *TINY, "--policy", "exported/policy.onnx"])
    assert "exported on tiny" in capsys.readouterr().out


def test_what_was_done_to_a_trace_is_said_by_option_and_by_file(place, capsys):
    words = ["--policies", "round-robin", "--loads", "1", "--json", "out.json"]
    main(
        ["evaluate", *TINY[:2], "--trace", "long.csv", "--too-long", "cut", "--seeds", "3", *words]
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "long.csv: cut 1 of 2 requests, as they exceed 131,072 tokens" in said
    assert "the 3 seeds make one episode" in said
    assert "[" not in said.split("one episode: it is played once")[1]
    trace = json.loads((place / "out.json").read_text())["trace"]
    assert (trace["cut_requests"], trace["tokens_not_played"]) == (1, 200_010 - 131_072)
    scenario = yaml.safe_load((place / "long.yaml").read_text())
    scenario["workload"]["too_long"] = "cut"
    (place / "cut.yaml").write_text(yaml.safe_dump(scenario))
    main(["evaluate", "--scenario", "cut.yaml", "--seeds", "3", *words])
    assert "cut 1 of 2 requests" in " ".join(capsys.readouterr().out.split())
    assert json.loads((place / "out.json").read_text())["trace"] == trace


def test_a_batch_is_played_and_its_loads_are_one(place, capsys):
    main(["evaluate", *TINY[:2], "--trace", "batch.csv", "--policies", "round-robin"])
    said = " ".join(capsys.readouterr().out.split())
    assert "the 3 loads make the same episodes" in said
    assert "nan" not in said


def test_chats_play_open_if_told_to_and_their_results_say_so(capsys, tmp_path):
    words = ["evaluate", "--scenario", "mixed-chat", "--policies", "least-outstanding"]
    words += ["--loads", "1.5", "--seeds", "1", "--num-requests", "300"]
    found = {}
    for name, option in (("closed", []), ("open", ["--no-wait-for-answers"])):
        main([*words, *option, "--json", str(tmp_path / name)])
        found[name] = json.loads((tmp_path / name).read_text())
    assert "mixed-chat, open loop, load 1.5" in capsys.readouterr().out
    assert found["open"]["scenario"]["name"] == "mixed-chat, open loop"
    assert found["open"]["scenario"]["workload"]["sessions"]["wait_for_answers"] is False
    latency = {k: d["aggregates"][0]["metrics"]["e2e_mean_s"] for k, d in found.items()}
    assert latency["open"] > 1.1 * latency["closed"]


@pytest.mark.parametrize(
    ("scenario", "why"),
    [
        ("failures", "no request of failures waits for an answer"),
        ("agent-sessions", "requests of agent-sessions (workload kind agents) have no times"),
    ],
)
def test_open_loops_of_what_has_none_are_refused(refused, scenario, why):
    words = ["simulate", "--scenario", scenario, "--no-wait-for-answers"]
    assert f"{why}" in refused(*words)
