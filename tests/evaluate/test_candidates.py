"""Scores from outside: candidates in, what each is worth out."""

from __future__ import annotations

import json

import pytest

from servegym.baselines.score import RULES_AS_SCORES
from servegym.cli import main
from servegym.errors import ConfigError
from servegym.evaluate.candidates import read_candidates
from servegym.export.resolve import resolve_policy

SMALL = ["--scenario", "azure-conv-fit", "--num-requests", "120", "--seeds", "2"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def proposed(tmp_path):
    path = tmp_path / "candidates.jsonl"
    rows = [
        {"score": RULES_AS_SCORES["added-delay"], "id": "the rule itself"},
        {"score": "relative_speed", "id": 7},
        {"score": "speed"},
    ]
    path.write_text("\n".join([*map(json.dumps, rows), "", "no json", '["up"]']))
    return path


def test_each_candidate_has_a_line(proposed, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    main(["score", str(proposed), *SMALL, "--out", str(out), "--export", str(tmp_path / "best")])
    assert "2 judged, 3 refused" in capsys.readouterr().out
    rule, bad, unknown, broken, a_list = lines_of(out)
    assert (rule["id"], rule["parts"]) == ("the rule itself", 37)
    assert (rule["compared"], rule["low"], rule["high"]) == (1.0, 1.0, 1.0)
    assert bad["id"] == 7
    assert 1.0 < bad["low"] < bad["compared"] < bad["high"]
    assert bad["objective"] > rule["objective"] > 0.0
    assert "unknown feature or function of a score 'speed'" in unknown["error"]
    assert "this is no JSON" in broken["error"]
    assert "got list" in a_list["error"]
    best = resolve_policy(str(tmp_path / "best" / "score.json"))
    assert str(best.expression) == RULES_AS_SCORES["added-delay"]


def test_results_go_to_standard_output_alone_unless_a_file_is_named(proposed, capsys):
    main(["score", str(proposed), *SMALL])
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 5


def test_shares_are_compared_by_differences(tmp_path, capsys):
    path = tmp_path / "candidates.jsonl"
    path.write_text('{"score": "-relative_speed"}\n')
    main(["score", str(path), "--scenario", "slo-chat", "--num-requests", "60", "--seeds", "1"])
    (line,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert 0.0 <= line["objective"] <= 1.0
    assert -1.0 <= line["compared"] <= 1.0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"score": "up", "score": "up"}', "given twice"),
        ('{"score": "up", "idea": 1}', "got idea"),
        ('{"id": 1}', '"score" is no text'),
        ('{"score": "up", "id": [1]}', '"id" is no text or whole number'),
        ('{"score": "up", "id": true}', '"id" is no text or whole number'),
        ("[" * 100_000, "this is no JSON"),
    ],
)
def test_a_wrong_line_is_told_in_a_sentence(tmp_path, line, said):
    path = tmp_path / "candidates.jsonl"
    path.write_text(line)
    (found,) = read_candidates(path)
    assert said in found.error
    assert "\n" not in found.error


def test_wrong_files_are_refused(tmp_path):
    for content, said in ((b"\n\n", "must have from 1 to"), (b"\xff\xfe", "it is not UTF-8")):
        path = tmp_path / "candidates.jsonl"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            read_candidates(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_candidates(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--scenario", "kv-starved"], "scores are of dispatchers"),
        (["--reference", "nonsense"], "unknown policy 'nonsense'"),
    ],
)
def test_wrong_options_are_refused(proposed, words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(["score", str(proposed), *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_nothing_is_exported_where_nothing_is_right(tmp_path, capsys):
    path = tmp_path / "candidates.jsonl"
    path.write_text('{"score": "speed"}\n')
    with pytest.raises(SystemExit):
        main(["score", str(path), *SMALL, "--export", str(tmp_path / "best")])
    assert "no score that could be exported" in capsys.readouterr().err
