from __future__ import annotations

import json
from pathlib import Path

import pytest

from servegym.cli import main

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def refused(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(["validate", *map(str, words)])
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("servegym: ")
    assert text.count("\n") == 1
    return text


def test_command_asks_for_something_to_validate_against(capsys):
    assert "--e2e DIR or --published FILE" in refused(capsys)


def test_command_refuses_wrong_input_in_one_sentence(capsys, tmp_path, write_run):
    assert "no folder at" in refused(capsys, "--e2e", tmp_path / "nowhere")
    assert "no file at" in refused(capsys, "--published", tmp_path / "nothing.csv")
    assert "unknown GPU 'H9000'" in refused(capsys, "--e2e", write_run(gpu="H9000"))


def test_command_writes_numbers_tables_and_page(capsys, tmp_path, write_run, write_table):
    pytest.importorskip("matplotlib")
    paths = {name: tmp_path / "out" / name for name in ("a.json", "a.md", "a.html")}
    runs = write_run()
    document = paths["a.md"]
    document.parent.mkdir()
    document.write_text("before\n<!-- runs: begin -->old<!-- runs: end -->\nafter\n")
    table = write_table({}, {"gpu": "none"})
    sources = ["--e2e", str(runs), "--published", str(table)]
    files = ["--json", str(paths["a.json"]), "--report", str(paths["a.html"])]
    main(["validate", *sources, *files, "--markdown", str(document)])
    numbers = json.loads(paths["a.json"].read_text())
    assert numbers["counts"] == {"runs": 1, "rows": 1, "skipped_files": 2, "skipped_rows": 1}
    text = document.read_text()
    assert text.startswith("before\n")
    assert "old" not in text
    assert "| TTFT, ms, p99 |" in text
    assert "Not simulated: 1 of 2 rows" in text
    page = paths["a.html"].read_text()
    assert page.count("data:image/png;base64,") == 4  # CDFs, time series, scatter, errors
    assert "http" not in page
    assert "not simulated: 1 of 2" in capsys.readouterr().out.lower()


def test_proposed_constants_are_applied_to_the_family_they_are_of(tmp_path, write_table):
    table = write_table({}, {"engine": "SGLang", "engine_version": "0.5.4"})
    tpot_s = {}
    for flag in ("--no-proposed", "--proposed"):
        path = tmp_path / f"{flag}.json"
        main(["validate", "--published", str(table), flag, "--json", str(path)])
        rows = json.loads(path.read_text())["rows"]
        tpot_s[flag] = {row["family"]: row["figures"]["tpot_s"]["simulated"] for row in rows}
    added = {
        family: tpot_s["--proposed"][family] - tpot_s["--no-proposed"][family]
        for family in ("vllm", "sglang")
    }
    assert added["vllm"] == 0
    assert added["sglang"] > 0.5e-3  # every step lasts half a millisecond more


def test_refit_asks_for_published_rows(capsys, write_run):
    assert "give --published FILE" in refused(capsys, "--e2e", write_run(), "--refit")


def test_sample_belongs_to_refit(capsys, write_table):
    table = str(write_table({}))
    assert "give --refit" in refused(capsys, "--published", table, "--sample", "3")
    assert "got 0" in refused(capsys, "--published", table, "--refit", "--sample", "0")


def test_refit_writes_the_constants_of_a_family_and_its_left_out_error(
    tmp_path, capsys, write_table
):
    rows = [{"file": name, "concurrency": str(c)} for name in "ab" for c in range(1, 11)]
    document = tmp_path / "fit.md"
    main(
        ["validate", "--published", str(write_table(*rows)), "--refit", "--markdown", str(document)]
    )
    text = document.read_text()
    assert "| vllm |" in text
    assert ", b " in text
    assert "GPU left out" in text
    assert "Proposed constants" in text


@pytest.mark.skipif(not (DATA / "e2e").is_dir(), reason="the real runs are not here")
def test_real_runs_are_all_replayed_and_the_other_file_is_named(tmp_path, capsys):
    main(["validate", "--e2e", str(DATA / "e2e"), "--json", str(tmp_path / "a.json")])
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert len(numbers["runs"]) == 3
    assert [item["name"] for item in numbers["skipped_files"]] == [
        "splitwise_perf_model_llama2-70b.csv.gz"
    ]
    for run in numbers["runs"]:
        assert run["num_requests"] == 300
        errors = {(f["metric"], f["statistic"]): f["error"] for f in run["figures"]}
        assert abs(errors["output_tokens_per_s", "whole"]) < 0.5
