"""Metrics pages of several engines, and pages with things in them that make no sense."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.errors import ConfigError
from servegym.serve.monitoring.metrics import (
    SGLANG,
    VLLM,
    MetricsError,
    metric_names,
    read_metrics,
    samples,
)
from servegym.serve.state import EngineMetrics

from ..linear import LONG, cpu_limit  # noqa: TID252 - tests are no package

A = frozenset({"a"})
PAGES = Path(__file__).parent / "pages"
VLLM_PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:cache_config_info{block_size="16",engine="0",n="a \\"q\\" }",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="50"} 1.0
vllm:e2e_request_latency_seconds_bucket{engine="0",le="0.3",model_name="m"} 5.0
"""
SGLANG_PAGE = (PAGES / "sglang-dp-attention.txt").read_text()


def test_vllm_engines_of_one_server_are_added_up():
    want = EngineMetrics(7, 1, 0.5, kv_capacity_tokens=2400)
    assert read_metrics(VLLM_PAGE, VLLM) == want
    assert read_metrics(VLLM_PAGE, None) == want


def test_vllms_older_name_of_the_cache_usage_is_known():
    page = """\
vllm:num_requests_running{model_name="m"} 2.0
vllm:num_requests_swapped{model_name="m"} 0.0
vllm:num_requests_waiting{model_name="m"} 5.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.125
vllm:cpu_cache_usage_perc{model_name="m"} 0.5
vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0
"""
    assert read_metrics(page, None) == EngineMetrics(2, 5, 0.125)


@pytest.mark.parametrize(
    ("page", "engine", "want"),
    [
        ("vllm-0.8", "vllm", EngineMetrics(12, 3, 0.5, kv_capacity_tokens=32_000)),
        ("vllm-data-parallel", "vllm", EngineMetrics(10, 6, 0.25, kv_capacity_tokens=64_000)),
        ("sglang-tensor-parallel", "sglang", EngineMetrics(6, 2, 0.28, kv_capacity_tokens=41_000)),
        ("sglang-dp-attention", "sglang", EngineMetrics(10, 6, 0.25, kv_capacity_tokens=400_000)),
        (
            "sglang-dp-attention-all-ranks",
            "sglang",
            EngineMetrics(10, 6, 0.25, kv_capacity_tokens=400_000),
        ),
        ("tensorrt-llm", "tensorrt-llm", EngineMetrics(9, 4, 0.625, kv_capacity_tokens=48_000)),
    ],
)
def test_pages_written_from_the_engines_sources(page, engine, want):
    text = (PAGES / f"{page}.txt").read_text()
    assert read_metrics(text, metric_names(engine)) == want
    assert read_metrics(text, None) == want


def test_each_part_is_counted_by_its_lowest_rank_whatever_the_order():
    lines = (PAGES / "sglang-dp-attention-all-ranks.txt").read_text().splitlines()
    want = read_metrics("\n".join(lines), SGLANG)
    # the ranks above the first repeat what it says: even stale values of theirs do not count
    others = [re.sub(r"} .*", "} 77.0", x) for x in lines if re.search('tp_rank="[1357]"', x)]
    first = [x for x in lines if re.search('tp_rank="[0246]"', x)]
    assert read_metrics("\n".join(others + first[::-1]), SGLANG) == want


def test_a_breakdown_without_its_total_is_added_up():
    page = "\n".join(
        x
        for x in (PAGES / "sglang-dp-attention-all-ranks.txt").read_text().splitlines()
        if 'priority=""' not in x or "reqs" not in x
    )
    assert read_metrics(page, SGLANG)[:2] == (10, 6)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("vllm:kv_cache_usage_perc", "vllm:kv_cache_usage_perc or vllm:gpu_cache_usage_perc"),
        ("vllm:num_requests_waiting", "no vllm:num_requests_waiting"),
    ],
)
def test_a_missing_quantity_is_an_error_and_never_zero(line, sentence):
    page = "\n".join(x for x in VLLM_PAGE.splitlines() if not x.startswith(f"{line}{{"))
    with pytest.raises(MetricsError, match=sentence):
        read_metrics(page, VLLM)
    with pytest.raises(MetricsError, match="name the engine or give a mapping file"):
        read_metrics(page, None)


def test_values_that_are_no_numbers_are_missing():
    with pytest.raises(MetricsError, match="vllm:num_requests_running"):
        read_metrics(VLLM_PAGE.replace("} 3.0", "} NaN").replace("} 4.0", "} +Inf"), VLLM)


def test_senseless_lines_and_line_ends_are_passed_over():
    page = "garbage {{{\n\x00\xff\n{} 3\nvllm:x{ 4\n" + VLLM_PAGE.replace("\n", "\r\n") + "trailing"
    assert read_metrics(page, VLLM) == read_metrics(VLLM_PAGE, VLLM)


def test_samples_with_a_time_say_their_age():
    page = VLLM_PAGE.replace('model_name="m"} 3.0', 'model_name="m"} 3.0 1700000000000')
    assert read_metrics(page, VLLM, wall_s=1700000004.5).age_s == pytest.approx(4.5)
    assert read_metrics(page, VLLM, wall_s=1699999999.0).age_s == 0  # their clock is ahead
    assert read_metrics(VLLM_PAGE, VLLM, wall_s=1700000004.5).age_s == 0


@pytest.mark.parametrize(
    "number", ["1e308", "1e999", "-5", "nan", "9" * 5000, "1 " + "9" * 400, "0x3", "1 -"]
)
def test_no_number_breaks_the_reader_or_gets_out_of_range(number):
    for page in (
        VLLM_PAGE.replace("} 3.0", f"}} {number}").replace("} 4.0", f"}} {number}"),
        VLLM_PAGE.replace('"100"', f'"{number}"').replace('"16"', f'"{number}"'),
        SGLANG_PAGE.replace("100000.0", number),
    ):
        try:
            metrics = read_metrics(page, None, 1e9)
        except MetricsError:
            continue
        assert 0 <= metrics.num_running < math.inf
        assert metrics.kv_capacity_tokens is None or 0 < metrics.kv_capacity_tokens < math.inf
        assert math.isfinite(metrics.age_s)


@pytest.mark.parametrize(
    "piece",
    [
        " ",
        "\t ",
        "{",
        "}",
        '"',
        "\\",
        ",",
        'a="',
        "vllm:num_requests_running",
        "vllm:num_requests_running ",
        "vllm:num_requests_running{",
        'vllm:num_requests_running{a="',
        'vllm:num_requests_running{a="b"',
        'a="b",',
        "1 ",
        "\n ",
        "\r",
    ],
)
@pytest.mark.parametrize("before", ["", "vllm:num_requests_running", "vllm:num_requests_running{"])
def test_no_run_of_anything_costs_more_than_its_length(before, piece):
    page = before + piece * (LONG // len(piece))
    with cpu_limit(), contextlib.suppress(MetricsError):
        read_metrics(page, None)


def test_a_page_of_nothing_but_samples_is_refused():
    with pytest.raises(MetricsError, match="more than 10000 such samples"):
        read_metrics("vllm:num_requests_running 1\n" * 20_000, None)


def test_labels_are_read_to_the_letter():
    got = list(samples('a{b="1",c="x\\"}{,",} 3 4000 # {t="1"} 9\na 5 # {}\na{b="1" c="2"} 3', A))
    assert got[0] == ("a", {"b": "1", "c": 'x\\"}{,'}, 3.0, 4.0)
    assert got[1][:3] == ("a", {}, 5.0)
    assert len(got) == 2


@given(st.text(max_size=300))
def test_no_page_breaks_the_reader(text):
    for page in (text, VLLM_PAGE + text, text + VLLM_PAGE):
        try:
            metrics = read_metrics(page, None, 0.0)
        except MetricsError:
            continue
        assert metrics.num_running >= 0
        assert 0 <= metrics.kv_cache_usage <= 1


def test_a_mapping_file_names_the_metrics_of_any_engine(tmp_path):
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(
        "num_running: tgi_batch_current_size\n"
        "num_waiting: [tgi_queue_size, old_queue]\n"
        "kv_cache_usage: mine_usage\n"
        "generated_tokens: mine_generated\n"
    )
    page = "tgi_batch_current_size 3\nold_queue 2\nmine_usage 1.5\nmine_generated 70\n"
    got = read_metrics(page, metric_names(str(mapping)))
    assert got == EngineMetrics(3, 2, 1.0, generated_tokens=70)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("num_running: a\nnum_waiting: b\n", "kv_cache_usage: field required"),
        (
            "num_running: a\nnum_waiting: b\nkv_cache_usage: c\ncolour: d",
            "unknown key colour: choose one of",
        ),
        ("[1, 2", "is no readable YAML mapping"),
        ("7", "is no readable YAML mapping"),
    ],
)
def test_a_wrong_mapping_is_refused_in_one_sentence(tmp_path, content, sentence):
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        metric_names(str(mapping))


def test_unknown_engines_are_named():
    with pytest.raises(ConfigError, match=r"did you mean vllm.*yaml file with a mapping"):
        metric_names("vlm")
    assert metric_names("auto") is None
    assert metric_names("sglang") == SGLANG
