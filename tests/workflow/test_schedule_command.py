"""`servegym schedule` from a file to a table, JSON and a chart."""

from __future__ import annotations

import json
import re

import pytest

from servegym.cli import main
from servegym.workflow.dag_file import write_dag


@pytest.fixture
def place(tmp_path, monkeypatch, classic):
    monkeypatch.chdir(tmp_path)
    write_dag(classic, tmp_path / "dag.json")
    return tmp_path


def test_classic_example_end_to_end(place, capsys):
    words = "schedule --dag dag.json --policies heft,cpop,peft --json out.json --plot out.svg"
    main(words.split())
    said = capsys.readouterr().out
    assert "classic: 10 tasks on 3 devices; no schedule takes less than 41 s" in said
    document = json.loads((place / "out.json").read_text())
    assert document["schema"] == "servegym-schedule-1"
    assert document["devices"] == ["P1", "P2", "P3"]
    found = {entry["policy"]: entry for entry in document["schedules"]}
    assert {name: entry["makespan_s"] for name, entry in found.items()} == {
        "heft": 80,
        "cpop": 86,
        "peft": 85,
    }
    assert found["heft"]["slr"] == pytest.approx(80 / 41)
    assert found["heft"]["speedup"] == pytest.approx(127 / 80)
    assert found["heft"]["tasks"][0] == {
        "task": "T1",
        "device": "P3",
        "start_s": 0,
        "finish_s": 9,
    }
    assert len(found["heft"]["tasks"]) == 10
    assert (place / "out.svg").read_text().count("<path") > 30  # a bar for each task and policy


def test_policies_may_be_separated_by_spaces(place, capsys):
    main(["schedule", "--dag", "dag.json", "--policies", "min-min", "etf"])
    said = capsys.readouterr().out
    assert "min-min" in said
    assert "etf" in said


def test_job_shop_has_no_speedup(place, capsys):
    (place / "shop.txt").write_text("2 2\n0 3 1 5\n1 2 0 4\n")
    main(["schedule", "--dag", "shop.txt", "--policies", "spt,heft", "--json", "out.json"])
    entry = json.loads((place / "out.json").read_text())["schedules"][0]
    # 0-0 until 3, 1-0 until 2; then 1-1 waits for machine 0 until 3, 0-1 runs from 3 to 8
    assert (entry["makespan_s"], entry["speedup"]) == (8, None)


def test_wfformat_runs_on_the_devices_given(place, capsys):
    tasks = [{"name": "x", "id": "x", "parents": []}]
    body = {
        "specification": {"tasks": tasks},
        "execution": {"tasks": [{"id": "x", "runtimeInSeconds": 6}]},
    }
    (place / "wf.json").write_text(json.dumps({"name": "wf", "workflow": body}))
    main(["schedule", "--dag", "wf.json", "--speeds", "1", "3", "--json", "out.json"])
    document = json.loads((place / "out.json").read_text())
    assert document["devices"] == ["device0-x1", "device1-x3"]
    assert document["schedules"][0]["makespan_s"] == 2


def test_a_record_without_data_says_that_the_links_make_no_difference(place, capsys):
    tasks = [{"name": name, "id": name, "parents": []} for name in ("x", "y")]
    tasks[1]["parents"] = ["x"]
    runs = [{"id": name, "runtimeInSeconds": 6} for name in ("x", "y")]
    body = {"specification": {"tasks": tasks}, "execution": {"tasks": runs}}
    (place / "wf.json").write_text(json.dumps({"name": "wf", "workflow": body}))
    main(["schedule", "--dag", "wf.json"])
    assert "no edge of wf carries data: its links make no difference" in capsys.readouterr().out
    files = [{"id": "f", "sizeInBytes": 5}]
    tasks[0]["outputFiles"] = tasks[1]["inputFiles"] = ["f"]
    body["specification"]["files"] = files
    (place / "wf.json").write_text(json.dumps({"name": "wf", "workflow": body}))
    main(["schedule", "--dag", "wf.json"])
    assert "carries data" not in capsys.readouterr().out


def test_page_shows_every_task_of_every_policy_with_its_relatives(place):
    main(["schedule", "--dag", "dag.json", "--policies", "heft,cpop", "--plot", "out.html"])
    page = (place / "out.html").read_text()
    assert page.count('<rect class="task"') == 20
    assert page.count("<svg ") == 2
    assert "<h2>heft, 80 s</h2>" in page
    assert "<title>T1 on P3: 0 to 9 s</title>" in page
    # T8 (number 7) waits for T2, T4 and T6, and T10 for it
    assert 'data-task="7" data-parent="1 3 5" data-child="9"' in page
    assert "http" not in page.replace("http://www.w3.org", "")  # needs nothing but itself


def test_page_shows_names_as_text(place):
    document = json.loads((place / "dag.json").read_text())
    document["name"] = "<b>a & b</b>"
    (place / "dag.json").write_text(json.dumps(document))
    main(["schedule", "--dag", "dag.json", "--policies", "heft", "--plot", "out.html"])
    page = (place / "out.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in page


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--dag none.json", "none.json cannot be read: No such file or directory"),
        ("--dag dag.json --policies heff", "unknown policy 'heff': .*did you mean heft"),
        ("--dag dag.json --policies ,", "give at least one policy"),
        ("--dag dag.json --policies heft,heft", "policy heft is given twice"),
        ("--dag dag.json --policies spt", "spt is a job-shop rule"),
        ("--dag dag.json --plot out.gif", "out.gif must end in .html, .png, .pdf, .svg"),
        ("--dag dag.json --json .", "cannot be written"),
        ("--dag dag.json --speeds 0", "speeds must be numbers above 0"),
        ("--dag dag.json --speeds 1 2", "dag.json names its own devices"),
        ("--dag dag.json --link-latency-s 1", "dag.json names its own devices"),
        ("--dag dag.json --instances 1-5", "--instances is for a benchmark: leave it out"),
        ("--benchmark taillard --speeds 1 2", "--speeds is for a WfFormat file: leave it out"),
        ("--dag dag.json --time-limit-s 0", "time_limit_s must be above 0, got 0"),
        ("--dag cycle.json", "in a cycle: T1 -> .* -> T10 -> T1$"),
        ("--dag missing.json", "task T3 has no duration on device P2"),
        ("--dag apart.json", "device P2 cannot be reached from P1"),
    ],
)
def test_wrong_words_end_with_one_sentence(place, capsys, words, sentence):
    for name in ("cycle", "missing", "apart"):
        document = json.loads((place / "dag.json").read_text())
        if name == "cycle":
            document["edges"].append({"parent": "T10", "child": "T1", "transfer_s": 1})
        elif name == "missing":
            del document["tasks"][2]["duration_s"]["P2"]
        else:
            document["edges"][0] = {"parent": "T1", "child": "T2", "bytes": 18}
        (place / f"{name}.json").write_text(json.dumps(document))
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(SystemExit) as end:
        main(["schedule", *words.split()])
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert re.search(sentence, said.err), said.err
    assert sorted(path.name for path in place.iterdir()) == before
