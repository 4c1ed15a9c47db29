"""Names of policies put together of several."""

from __future__ import annotations

import pytest

from servegym.baselines.parts import join_parts, split_parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("added-delay", ("added-delay",)),
        ("added-delay+footprint", ("added-delay", "footprint")),
        (
            "added-delay:decode=2,prefill=1+srpt-oracle",
            ("added-delay:decode=2,prefill=1", "srpt-oracle"),
        ),
        ("dynamo:block_tokens=1e+3+ltr:period=+5", ("dynamo:block_tokens=1e+3", "ltr:period=+5")),
        ("runs/a/policy.onnx+runs/b/ordering.npz", ("runs/a/policy.onnx", "runs/b/ordering.npz")),
        ("a+b+c", ("a", "b", "c")),
    ],
)
def test_a_plus_stands_between_parts_but_not_in_numbers(text, parts):
    assert split_parts(text) == parts
    assert join_parts(parts) == text


def test_a_file_is_taken_whole_whatever_its_name(tmp_path):
    path = tmp_path / "c++libs.onnx"
    assert len(split_parts(str(path))) == 2
    path.touch()
    assert split_parts(str(path)) == (str(path),)
