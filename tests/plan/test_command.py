"""`servegym plan` end to end, and one sentence for each wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from servegym.cli import main

PRICES = """L40S: {usd_per_h: 1.0, source: "a list, 2026-06"}
H100-SXM-80GB: {usd_per_h: 9.0, source: "the same"}
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with a trace and prices."""
    monkeypatch.chdir(tmp_path)
    rows = (f"{0.04 * i},{200 + 40 * (i % 7)},{20 + i % 9}" for i in range(240))
    header = "arrival_s,prompt_tokens,output_tokens\n"
    (tmp_path / "trace.csv").write_text(header + "\n".join(rows) + "\n")
    (tmp_path / "batch.csv").write_text(header + "5.0,100,10\n" * 20)
    (tmp_path / "long.csv").write_text(header + "0.0,100,10\n1.0,125000,10\n")
    (tmp_path / "prices.yaml").write_text(PRICES)
    (tmp_path / "few.yaml").write_text('L40S: {usd_per_h: 1.0, source: "a list"}\n')
    (tmp_path / "free.yaml").write_text('L40S: {usd_per_h: 0, source: "a list"}\n')
    return tmp_path


def test_plan_names_the_fleet_its_rivals_and_the_prices(place, capsys):
    pytest.importorskip("matplotlib")
    played = ["--trace", "trace.csv", "--gpus", "L40S,H100-SXM-80GB", "--degrees", "1"]
    asked = ["--slo", "ttft=0.3,tpot=0.05", "--prices", "prices.yaml", "--uncertainty", "4"]
    main(
        [
            "plan",
            *played,
            *asked,
            "--json",
            "out/plan.json",
            "--report",
            "out/plan.html",
            "--plot",
            "out/plan.svg",
        ]
    )
    said = capsys.readouterr().out
    found = json.loads((place / "out" / "plan.json").read_text())
    assert found["schema"] == "servegym-plan-1"
    assert found["verdict"] in " ".join(said.split())
    assert "price of L40S: $1 an hour and GPU (a list, 2026-06)" in said
    best = found["best"]
    count = best["fleet"][0]["count"]
    (entry,) = best["fleet"]
    assert entry == {
        "gpu": "L40S",
        "tp": 1,
        "pipeline_parallel_size": 1,
        "num_speculative_tokens": 0,
        "count": count,
    }
    assert best["usd_per_h"] == best["fleet"][0]["count"]
    assert best["attainment"] >= 0.99
    assert best["worlds"]["asked"] == 4
    assert f"it holds in {best['worlds']['held']} of 4 worlds" in said
    assert any("H100" in one["name"] and "more" in one["why"] for one in found["others"])
    page = (place / "out" / "plan.html").read_text()
    assert best["name"] in page
    assert (place / "out" / "plan.svg").read_text().startswith("<?xml")
    assert 'src="data:image/png' in page


def test_plan_wants_to_know_how_many_drafts_are_accepted(place, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--trace", "trace.csv", "--gpus", "L40S", "--drafts", "0", "3"])
    assert "say how often a draft is accepted" in " ".join(capsys.readouterr().err.split())


def test_plan_says_so_if_no_fleet_is_enough(place, capsys):
    played = ["--trace", "trace.csv", "--gpus", "L40S", "--degrees", "1"]
    main(["plan", *played, "--slo", "ttft=0.0001,tpot=0.05"])
    said = capsys.readouterr().out
    assert "No fleet of up to 64 replicas keeps 0.99 of 240 requests" in said
    assert "not even 64 are enough: 0.00% in time" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--slo ttft=0.5", "limits are written ttft=0.5,tpot=0.04"),
        ("--slo ttft=0.5,tpot=fast", "in seconds above 0, got 'ttft=0.5,tpot=fast'"),
        ("--gpus L40S,H100", "unknown GPU 'H100'"),
        ("--gpus L40S,L40S", "gpus must be given once each"),
        ("--model Llama", "unknown model 'Llama'"),
        ("--rules fastest", "unknown policy 'fastest'"),
        ("--attainment 1.5", "attainment: input should be less than or equal to 1, got 1.5"),
        ("--budget 0.5", "the cheapest replica, L40S x1, costs $1.50 an hour"),
        ("--prices none.yaml", "no readable file of prices at none.yaml"),
        ("--gpus H100-SXM-80GB --prices few.yaml", "few.yaml has no price of H100-SXM-80GB"),
        ("--prices free.yaml", "usd_per_h: input should be greater than 0"),
        ("--model Llama-3.1-70B", "no replica of these GPUs and degrees can serve Llama-3.1-70B"),
        ("--uncertainty -1", "num_worlds: input should be greater than or equal to 0"),
        ("--plot chart.gif", "chart.gif must end in .png, .pdf, .svg"),
        ("--rate-rps 0", "rate_rps must be above 0"),
        ("--trace batch.csv --rate-rps 5", "there is no rate: leave --rate-rps out"),
        ("--trace long.csv --gpus A30", "its KV cache holds"),
    ],
)
def test_wrong_input_is_told_in_one_sentence(place, capsys, arguments, sentence):
    given = {"--trace": "trace.csv", "--gpus": "L40S"}
    words = arguments.split()
    rest = [x for name, value in given.items() if name not in words for x in (name, value)]
    with pytest.raises(SystemExit) as end:
        main(["plan", *rest, "--degrees", "1", *words])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert sentence in said
    assert len(said.splitlines()) == 1
