"""Which rows are put to peers, as what, and how their answers are compared."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from servegym.errors import ConfigError
from servegym.validate.published import Row, experiment
from servegym.validate.score import Comparison, RowScore

from .asking import ask_all
from .checkpoint import described
from .compare import Pair, answers_of, clients, general, pairs, table
from .work import drawn, work

CELLS = {
    "file": "paper",
    "tp": "2",
    "pp": "",
    "dp": "",
    "ep": "",
    "gpu_count": "2",
    "isl": "100",
    "osl": "10",
    "concurrency": "3",
    "request_rate": "",
    "notes": "",
}


def row(row_id="1", **changes) -> Row:
    named = {
        "source": "paper",
        "quality": "A",
        "engine": "vLLM",
        "engine_version": "0.19.0",
        "model": "meta-llama/Llama-3.1-70B",
        "precision": "fp8",
        "gpu": "h100_sxm",
        "notes": changes.get("notes", ""),
        "measured": {"tpot_s": 0.04, "ttft_s": 0.2},
    }
    named |= {name: value for name, value in changes.items() if name in named}
    cells = {name: value for name, value in changes.items() if name not in named}
    return Row(row_id=row_id, text={**CELLS, "notes": named["notes"], "twin": "", **cells}, **named)


def asked(**changes):
    changed = row(**changes)
    return work(changed, experiment(changed))


def test_peer_is_asked_what_the_row_measured():
    piece = asked()
    assert piece.prompt_tokens == [100] * 30  # ten requests a client
    assert piece.output_tokens == [10] * 30
    assert piece._replace(prompt_tokens=[], output_tokens=[]) == (
        *("1", "h100_sxm", "vllm", "meta-llama/Meta-Llama-3.1-70B", "fp8", False),
        *(2, 1, 0, 0, [], [], 3, False, 256, 8192),
    )


def test_experts_are_split_as_in_the_row():
    moe = {"model": "openai/gpt-oss-120b", "precision": "mxfp4", "gpu": "b200_sxm"}
    tensor, groups = asked(**moe), asked(**moe, ep="2")
    assert (tensor.tp, tensor.moe_tp, tensor.moe_ep) == (2, 2, 1)
    assert (groups.tp, groups.moe_tp, groups.moe_ep) == (2, 1, 2)
    assert tensor.weights == ""  # the checkpoint has them


def test_queued_requests_all_come_at_once():
    piece = asked(engine="TensorRT-LLM", concurrency="", request_rate="inf", isl="2000", osl="2000")
    assert (piece.queued, piece.concurrency, len(piece.prompt_tokens)) == (True, 1500, 1500)
    assert (piece.backend, piece.fp8_kv) == ("trtllm", True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "RTX-4090", "model": "meta-llama/Llama-3.1-8B"}, "no tables of RTX-4090"),
        ({"model": "Qwen2.5-7B"}, "no configuration of Qwen2.5-7B"),
        ({"concurrency": "", "request_rate": "2"}, "lack"),
        ({"notes": "ShareGPT"}, "lack"),
        ({"notes": "static batch"}, "static batch"),
        ({"notes": "1P1D, tp=1 per worker"}, "disaggregated"),
        ({"engine": "DeepSpeed"}, "no engine like deepspeed"),
    ],
)
def test_what_peers_cannot_be_asked_has_a_reason(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        asked(**changes)


def test_of_rows_alike_so_many_are_drawn_and_the_same_each_time():
    rows = [row(str(i), concurrency=str(i)) for i in range(1, 8)]
    rows += [row("other", gpu="h200_sxm"), row("refused", model="Qwen2.5-7B")]
    found, left_out = drawn(rows, 3)
    names = [one.row_id for one, _ in found]
    assert len(names) == 4
    assert names[-1] == "other"
    assert names == [one.row_id for one, _ in drawn(rows, 3)[0]]
    assert [item.name for item in left_out] == ["refused"]


def test_checkpoint_gets_other_weights_and_cache():
    config = {"hidden_size": 8, "quantization_config": {"quant_method": "mxfp4"}}
    own = {"quant_method": "mxfp4", "kv_cache_quant_algo": "BF16"}
    assert described(config, None, "", fp8_kv=False) == (
        config | {"quantization_config": own},
        None,
    )
    assert described({"hidden_size": 8}, None, "", fp8_kv=False) == ({"hidden_size": 8}, None)
    made, beside = described({"hidden_size": 8}, None, "fp8-block", fp8_kv=True)
    assert beside is None
    assert made["quantization_config"]["weight_block_size"] == [128, 128]
    assert made["quantization_config"]["kv_cache_quant_algo"] == "FP8"
    shipped = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    assert described(config, shipped, "", fp8_kv=False) == (
        config,
        {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "BF16"}},
    )


def test_a_peer_is_asked_what_it_has_not_answered_and_may_refuse(tmp_path, monkeypatch):
    asked_about = []

    def ask(piece, made):
        asked_about.append(piece["row_id"])
        if piece["row_id"] == "3":
            raise KeyError
        return {"tpot_s": 0.01}

    given, answers = tmp_path / "work.json", tmp_path / "answers.jsonl"
    given.write_text(json.dumps([{"row_id": name} for name in "123"]))
    answers.write_text('{"row_id": "1", "refused": "no table"}\n')
    monkeypatch.setattr("sys.argv", ["drive", str(given), str(answers)])
    ask_all(ask)
    assert asked_about == ["2", "3"]
    assert [json.loads(line) for line in answers.read_text().splitlines()] == [
        {"row_id": "1", "refused": "no table"},
        {"row_id": "2", "figures": {"tpot_s": 0.01}},
        {"row_id": "3", "refused": "KeyError"},
    ]


@pytest.fixture
def scores():
    """Two rows measured at 20 ms and 200 ms; ours is 10 % and 20 % too much in TPOT."""
    found = []
    for name, tpot_s in (("1", 0.022), ("2", 0.024)):
        one = row(name)
        figures = {"tpot_s": Comparison(0.02, tpot_s), "ttft_s": Comparison(0.2, 0.1)}
        found.append(RowScore(one, experiment(one), figures, [], ""))
    return found


def test_errors_are_compared_on_the_rows_and_figures_that_both_have(scores):
    peer = {"1": {"tpot_s": 0.026, "e2e_s": 1.0}, "absent": {"tpot_s": 1.0}}
    found = pairs(scores, peer)
    assert found["tpot_s"] == [pytest.approx(Pair(0.1, 0.3))]
    assert found["ttft_s"] == found["e2e_s"] == []


def test_table_has_medians_of_both_and_who_is_nearer(scores):
    peer = {name: {"tpot_s": 0.021 if name == "1" else 0.01, "ttft_s": 0.2} for name in "12"}
    made = table("Errors, by GPU", scores, {"peer": peer}, lambda score: (0, score.plan.setup.gpu))
    cells = ("2", "15.0 / 27.5 (2)", "50.0 / 0.0 (2)", "-", "-", "50 %")
    assert made.heads[0] == "GPU"
    assert made.rows == [("all", "peer", *cells), ("H100-SXM-80GB", "peer", *cells)]


def test_ranges_of_clients_are_in_their_order(scores):
    few = [replace(scores[0], plan=replace(scores[0].plan, concurrency=n)) for n in (300, 17, 4)]
    queued = replace(scores[0], plan=replace(scores[0].plan, loop="offline"))
    made = table("Errors, by clients", [queued, *few], {"peer": {"1": {"tpot_s": 0.02}}}, clients)
    names = [line[0] for line in made.rows]
    assert names == ["all", "up to 4", "up to 64", "over 256", "all queued"]


def test_answers_about_other_rows_are_left_out_and_missing_ones_are_an_error(tmp_path):
    path = tmp_path / "peer.jsonl"
    path.write_text('{"row_id": "1", "refused": "no table"}\n{"row_id": "9", "figures": {}}\n')
    assert answers_of(path, {"1"}) == [{"row_id": "1", "refused": "no table"}]
    with pytest.raises(ConfigError, match="no answer about 1 of 2 rows"):
        answers_of(path, {"1", "2"})


def test_rows_that_a_peer_refused_are_in_no_line(scores):
    made = table("Errors, by GPU", scores, {"peer": {}}, lambda score: (0, "GPU"))
    assert made.rows == []


def test_reasons_lose_what_is_particular_to_a_row():
    missing = 'replay failed: DataError: no rows for Key { quant: "fp8", m: %d } at /tmp/x/%s'
    assert (
        general(missing % (8, "h100")) == general(missing % (16, "l40s")) == "no rows for Key ..."
    )
    assert general("OOM: 'a' does not fit (tp=4)") == "OOM: ... does not fit (tp=...)"
    assert general("x" * 300) == "x" * 100
