"""The language of scores: what is read, how it is written, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.errors import ConfigError
from servegym.policy.expression import (
    FIELDS,
    MAX_CHARACTERS,
    MAX_DEPTH,
    MAX_SIZE,
    NUMBER,
    Expression,
    check_limits,
    number,
    parse,
)
from servegym.train.evolution import drawn


def three(name: str, a: float, b: float) -> Expression:
    return Expression(name, (number(a), number(b)))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("1 - 2 - 3", Expression("-", (three("-", 1, 2), number(3)))),
        ("1 - (2 - 3)", Expression("-", (number(1), three("-", 2, 3)))),
        ("1 + 2 * 3", Expression("+", (number(1), three("*", 2, 3)))),
        ("-1.5e-3 * 2", three("*", -0.0015, 2)),
        ("1 + 2 <= 3", Expression("<=", (three("+", 1, 2), number(3)))),
        ("up", Expression("up")),
        ("min(up, 2)", Expression("min", (Expression("up"), number(2)))),
        ("where(1 < 2, 3, 4)", Expression("where", (three("<", 1, 2), number(3), number(4)))),
    ],
)
def test_operators_bind_as_in_arithmetic(text, read):
    assert parse(text) == read
    assert parse(str(read)) == read


def test_what_is_written_is_read_as_the_same():
    rng = np.random.default_rng(3)
    sizes = set()
    for _ in range(400):
        expression = drawn(rng, levels=6)
        assert parse(str(expression)) == expression
        sizes.add(expression.size)
    assert max(sizes) > 30


def test_an_expression_says_what_it_reads():
    found = parse("prompt_tokens * up + up")
    assert (found.size, found.depth, found.fields()) == (5, 3, {"prompt_tokens", "up"})


@pytest.mark.parametrize("name", ["what_if_e2e_s", "has_prefill", "output_tokens", "__import__"])
def test_what_no_router_knows_cannot_be_read(name):
    assert name not in FIELDS
    with pytest.raises(ConfigError, match=f"unknown feature or function of a score '{name}'"):
        parse(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "at character 1, got the end"),
        ("1 +", "at character 4, got the end"),
        ("up up", "must have an operator or the end at character 3, got 'up'"),
        ("1 < 2 < 3", "must have an operator or the end"),
        ("(up", r"must have '\)' at character 4"),
        ("min up", r"must have '\(' at character 4"),
        ("min(1)", "function min of a score must have 2 arguments, got 1"),
        ("up; up", "got ';'"),
        ("up.real", "got '.'"),
        ("'up'", 'got "\'"'),
        ("1e999", "a number in a score must be at most 1.8e308"),
        ("spee", "unknown feature or function of a score 'spee'"),
        ("up\x00", r"got '\\x00'"),
        ("١", "got '١'"),  # noqa: RUF001
        ("(" * 5000, f"at most {MAX_DEPTH} levels"),
        ("-" * 5000 + "1", f"at most {MAX_DEPTH} levels"),
        ("abs(" * 40 + "1" + ")" * 40, f"at most {MAX_DEPTH} levels"),
        ("1+" * MAX_SIZE + "1", f"at most {MAX_SIZE} parts"),
        (" " * (MAX_CHARACTERS + 1), f"at most {MAX_CHARACTERS} characters"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text, said):
    with pytest.raises(ConfigError, match=said) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_an_expression_that_is_too_deep_is_refused_however_it_came_to_be():
    deep = Expression(NUMBER)
    for _ in range(MAX_DEPTH):
        deep = Expression("abs", (deep,))
    with pytest.raises(ConfigError, match=f"at most {MAX_DEPTH} levels, got {MAX_DEPTH + 1}"):
        check_limits(deep)
