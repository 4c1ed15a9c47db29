"""Metrics pages of several engines, and pages with things in them that make no sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.errors import ConfigError
from servegym.serve.metrics import (
    SGLANG,
    VLLM,
    MetricsError,
    metric_names,
    read_metrics,
)
from servegym.serve.state import EngineMetrics

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


def test_sglang_counts_each_request_once_whatever_its_ranks():
    page = """\
sglang:num_running_reqs{model_name="m",tp_rank="0",pp_rank="0"} 6
sglang:num_running_reqs{model_name="m",tp_rank="1",pp_rank="0"} 6
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 2
sglang:token_usage{model_name="m",tp_rank="0"} 0.28
sglang:max_total_num_tokens{model_name="m",tp_rank="0"} 41000
"""
    want = EngineMetrics(6, 2, 0.28, kv_capacity_tokens=41000)
    assert read_metrics(page, SGLANG) == want
    assert read_metrics(page, None) == want


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
        ("num_running: a\nnum_waiting: b\n", "kv_cache_usage: Field required"),
        ("num_running: a\nnum_waiting: b\nkv_cache_usage: c\ncolour: d", "colour: Extra"),
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
