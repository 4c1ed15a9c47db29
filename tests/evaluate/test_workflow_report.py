"""The report on schedulers of jobs: what its charts show is what was played."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from servegym.baselines.workflow.online.registry import online_rule
from servegym.cli import main
from servegym.errors import ConfigError
from servegym.evaluate.harness import evaluate
from servegym.evaluate.report import report_page, write_report
from servegym.evaluate.saturation import saturation_load
from servegym.problems.job_gantt import charted_schedule, charted_window
from servegym.workflow_scenario import WorkflowScenario

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
#: Puts the cursor on the first bar with a relative, and counts what then stands out.
PROBE = """<script>window.onload = () => {
  const bar = [...document.querySelectorAll('rect.task')].find(b => b.dataset.child);
  bar.dispatchEvent(new MouseEvent('mouseenter'));
  const whole = [...document.images].filter(i => i.complete && i.naturalWidth > 300);
  document.body.dataset.seen = [whole.length, document.querySelectorAll('rect.task').length,
    document.querySelectorAll('rect.child').length > 0].join('/');
};</script>"""
NAMES = ("round-robin", "srpt-cp", "mct-oracle", "least-slack")


def scenario(**changes) -> WorkflowScenario:
    return WorkflowScenario.model_validate(
        {
            "name": "asked & <answered>",
            "model": "Llama-3.1-8B",
            "engine": {"max_num_seqs": 8},
            "engines": [{"gpu": "A100-SXM-80GB"}, {"gpu": "L40S"}],
            "workload": {
                "kind": "mixture",
                "parts": [
                    {"share": 2.0, "workload": {"kind": "planner-executor"}},
                    {"share": 1.0, "workload": {"kind": "text-to-sql", "candidates": 3}},
                ],
            },
            "rate_jobs_per_s": 0.4,
            "deadline_scale": 0.3,
            "num_jobs": 30,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def result():
    policies = [online_rule(name) for name in NAMES]
    found = evaluate(scenario(), policies, loads=[0.5, 1.0], num_seeds=3)
    return dataclasses.replace(
        found,
        learned=["least-slack"],
        saturation={name: {0.9: 1.25, 0.99: 0.5} for name in NAMES},
    )


@pytest.fixture(scope="module")
def page(result) -> str:
    return report_page(result)


def bars_of(result, load, name):
    begin_s, span_s = charted_window(result, load, [name])
    trail = result.trails[name, load]
    step_name = result.scenario.workload.step_name
    schedule, job = charted_schedule(trail, step_name, begin_s, span_s)
    return begin_s, span_s, trail, schedule, job


@pytest.mark.parametrize("name", NAMES)
def test_chart_shows_every_stage_of_its_stretch_once_and_slots_do_not_overlap(result, name):
    begin_s, span_s, trail, schedule, job = bars_of(result, 1.0, name)
    stages = trail.stages[trail.stages["device"] >= 0]
    inside = (stages["finish_s"] > begin_s) & (stages["start_s"] < begin_s + span_s)
    assert 20 < schedule.workflow.num_tasks == inside.sum() <= 400
    assert job.tolist() == stages["job"][inside].tolist()
    rows = [row.split(".")[0].split(" ")[0] for row in schedule.workflow.devices]
    assert [rows[row] for row in schedule.device_idx] == [
        str(d) for d in stages["device"][inside].tolist()
    ]
    for row in range(schedule.workflow.num_devices):
        mine = np.flatnonzero(schedule.device_idx == row)
        mine = mine[np.argsort(schedule.start_s[mine])]
        assert (schedule.finish_s[mine][:-1] <= schedule.start_s[mine][1:]).all()
    # no more rows than slots; stages are named by their own family's steps
    assert schedule.workflow.num_devices <= 2 * 8
    steps = {task.split(" ", 1)[1] for task in schedule.workflow.tasks}
    assert {"plan", "answer", "candidate"} <= steps


def test_edges_between_shown_stages_are_the_jobs_own(result):
    _, _, trail, schedule, _ = bars_of(result, 1.0, "srpt-cp")
    flow = schedule.workflow
    number = {task.split(" ")[0]: v for v, task in enumerate(flow.tasks)}
    name = [f"{s['job']}.{s['stage']}" for s in trail.stages]
    want = {
        (number[name[a]], number[name[b]])
        for a, b in trail.edge.tolist()
        if name[a] in number and name[b] in number
    }
    got = set(zip(flow.graph.parent.tolist(), flow.graph.child.tolist(), strict=True))
    assert got == want
    assert len(got) > 10
    assert all(schedule.finish_s[a] <= schedule.start_s[b] for a, b in got)


def test_page_needs_nothing_but_itself_and_tells_names_and_numbers(page, result):
    assert not re.search(r"(https?|file)://|url\(|@import", page)
    assert "asked &amp; &lt;answered&gt;" in page
    assert "<answered>" not in page
    for load in result.loads:
        best = result.best_heuristic(load)
        assert f"Load {load:g}: the best rule is <b>{best}</b>" in page
        assert result.against_text("least-slack", best, load) in page
    assert "Only 3 seeds" in page
    assert "99 % jobs in time" in page
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page)
    assert page.count('class="gantt"') == len(result.shown_policies(1.0)) == len(NAMES)


def test_page_is_written_into_new_folders(result, tmp_path, page):
    path = tmp_path / "a" / "report.html"
    write_report(result, path)
    assert path.read_text(encoding="utf-8") == page


def test_plots_have_room_for_the_learned_the_best_and_the_worst(result):
    shown = result.shown_policies(1.0, limit=3)
    ranked = [name for name, _ in result.ranking(1.0)]
    assert shown[0] == "least-slack"
    assert shown[-1] == ranked[-1] == "round-robin"
    assert len(shown) == 3


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
def test_browser_shows_figures_and_marks_relatives(page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    shown = subprocess.run(
        [str(BROWSER), *options, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-500:]
    bars = page.count('<rect class="task"')
    assert f'data-seen="3/{bars}/true"' in shown.stdout


def test_saturation_is_the_largest_load_in_time():
    strict = scenario(
        objective="deadline",
        workload={"kind": "text-to-sql", "candidates": 3},
        deadline_scale=1.0,
        num_jobs=20,
    )
    rule = online_rule("edd")
    found = saturation_load(strict, rule, 0.9, num_seeds=2, tolerance=0.05)
    assert 0.05 < found < 4.0

    def share(load):
        result = evaluate(strict, [rule], loads=[load], num_seeds=2)
        return result.mean("edd", load, "deadline_attainment")

    assert share(found) >= 0.9 > share(found * 1.1)
    with pytest.raises(ConfigError, match="have no deadlines"):
        saturation_load(scenario(workload={"kind": "planner-executor"}), rule, 0.9)


def test_command_writes_page_and_picture_and_refuses_others(tmp_path, capsys):
    base = ["evaluate", "--scenario", "random-dags", "--policies", "fifo", "mct"]
    few = ["--loads", "0.5", "--seeds", "2", "--num-requests", "8"]
    page, chart = tmp_path / "r.html", tmp_path / "c.png"
    main([*base, *few, "--report", str(page), "--plot", str(chart)])
    assert "<h1>random-dags</h1>" in page.read_text(encoding="utf-8")
    assert chart.read_bytes().startswith(b"\x89PNG")
    for options, message in (
        (["--plot", str(tmp_path / "c.txt")], "must end in .png, .pdf, .svg"),
        (["--saturation"], "leave --saturation out"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([*base, *few, *options])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
