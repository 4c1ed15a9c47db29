"""Closed-form scores as text: a small language of arithmetic over the observation's fields.

A score is read by this parser and by nothing else: it knows numbers, the names of features, a few
functions and the limits below, so a file of scores from anywhere is safe to read. What is written
here is the grammar, in the order of binding:

    comparison = sum [("<" | "<=" | ">" | ">=") sum]
    sum        = product {("+" | "-") product}
    product    = factor {("*" | "/") factor}
    factor     = "-" factor | number | feature | function "(" comparison {"," comparison} ")"
               | "(" comparison ")"
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from servegym.errors import ConfigError, unknown_name
from servegym.policy.contract import INFERRED, REPLICA_FEATURES, REQUEST_FEATURES, Group

#: What a score may read: all that can be live.
_READABLE = Group.COUNTERS | Group.METRICS | Group.PREFIX | INFERRED
#: Rows of what may be read of a replica, and of the request, by name.
REPLICA_FIELDS = {f.name: i for i, f in enumerate(REPLICA_FEATURES) if f.group & _READABLE}
REQUEST_FIELDS = {f.name: i for i, f in enumerate(REQUEST_FEATURES) if f.group & _READABLE}
FIELDS = (*REPLICA_FIELDS, *REQUEST_FIELDS)

#: Operators, and how tightly they bind.
OPERATORS = {"<": 1, "<=": 1, ">": 1, ">=": 1, "+": 2, "-": 2, "*": 3, "/": 3}
#: Functions, and how many arguments they take. `where(c, a, b)` is `a` where `c` is above 0, else
#: `b`; `lowest`, `highest` and `mean` are over the replicas that may be chosen.
FUNCTIONS = {
    "negative": 1,
    "abs": 1,
    "sqrt": 1,
    "log": 1,
    "exp": 1,
    "lowest": 1,
    "highest": 1,
    "mean": 1,
    "min": 2,
    "max": 2,
    "pow": 2,
    "where": 3,
}
NUMBER = "number"

#: No score is longer, of more parts, or nested more deeply.
MAX_CHARACTERS, MAX_SIZE, MAX_DEPTH = 8_000, 255, 32

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<sign><=|>=|[-+*/<>(),]))",
    re.ASCII,
)
_END = ""
_MOST_QUOTED = 60


class Expression(NamedTuple):
    """A number, a feature, or an operator or function of other expressions.

    Attributes:
        name: `NUMBER`, a feature's name, or that of an operator or function.
        parts: What it is applied to.
        value: Of a number.
    """

    name: str
    parts: tuple[Expression, ...] = ()
    value: float = 0.0

    @property
    def size(self) -> int:
        """Numbers, features, operators and functions in it."""
        return 1 + sum(part.size for part in self.parts)

    @property
    def depth(self) -> int:
        """Of nesting: 1 for a number."""
        return 1 + max((part.depth for part in self.parts), default=0)

    def fields(self) -> set[str]:
        """Names of the features that it reads."""
        own = {self.name} if self.name in FIELDS else set()
        return own.union(*(part.fields() for part in self.parts))

    def __str__(self) -> str:
        """Write it, so that `parse` makes the same of the text."""
        return _written(self)


def number(value: float) -> Expression:
    """Make a number; a negative one is written, and read, as `-` of a positive one."""
    if value < 0.0:
        return Expression("negative", (number(-value),))
    return Expression(NUMBER, (), value + 0.0)  # there is no -0


def _written(expression: Expression, least: int = 0) -> str:
    """Write an expression, in brackets if it binds less tightly than `least`."""
    name, parts = expression.name, expression.parts
    if name == NUMBER:
        return repr(expression.value).removesuffix(".0")
    if name == "negative":
        return f"-{_written(parts[0], 4)}"
    if name in OPERATORS:
        own = OPERATORS[name]
        # of equals, the first are taken together; comparisons cannot follow each other
        left = _written(parts[0], own + (own == 1))
        text = f"{left} {name} {_written(parts[1], own + 1)}"
        return f"({text})" if own < least else text
    if not parts:
        return name
    return f"{name}({', '.join(map(_written, parts))})"


def parse(text: str) -> Expression:
    """Read a score.

    Args:
        text: As the grammar above says, such as `"outstanding_requests / relative_speed"`.

    Raises:
        ConfigError: If it is none, or too long; in a sentence that says where.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"a score must have at most {MAX_CHARACTERS} characters, got {len(text)}: shorten it"
        )
    found = _Parser(text).whole()
    check_limits(found)
    return found


def check_limits(expression: Expression) -> None:
    """Refuse what is too large.

    Raises:
        ConfigError: If it has too many parts, or is nested too deeply.
    """
    for what, value, most in (
        ("parts", expression.size, MAX_SIZE),
        ("levels", expression.depth, MAX_DEPTH),
    ):
        if value > most:
            raise ConfigError(f"a score must have at most {most} {what}, got {value}: simplify it")


class _Parser:
    """Reads one text, by recursive descent."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = self._next_at = 0
        self._kind = self._word = _END
        self._level = 0
        self._advance()

    def whole(self) -> Expression:
        found = self._comparison()
        if self._word != _END:
            raise self._error("an operator or the end")
        return found

    def _advance(self) -> str:
        """Go on to the next word; return the present one."""
        word = self._word
        self._at = self._next_at
        match = _TOKEN.match(self._text, self._at)
        if match:
            self._kind, self._word = str(match.lastgroup), match[str(match.lastgroup)]
            self._next_at = match.end()
        elif rest := self._text[self._at :].strip():
            self._kind, self._word = "sign", rest[:1]
            raise self._error("a number, a feature, a function or an operator")
        else:
            self._kind = self._word = _END
        return word

    def _error(self, wanted: str) -> ConfigError:
        got = repr(self._word) if self._word else "the end"
        shown = self._text if len(self._text) <= _MOST_QUOTED else f"{self._text[:_MOST_QUOTED]}..."
        place = len(self._text[: self._at]) + 1
        return ConfigError(
            f"score {shown!r} must have {wanted} at character {place}, got {got}: correct it"
        )

    def _comparison(self) -> Expression:
        # levels of brackets and signs, which the finished expression need not show
        self._level += 1
        if self._level > MAX_DEPTH:
            raise ConfigError(
                f"a score must have at most {MAX_DEPTH} levels, got more: simplify it"
            )
        found = self._chain(2)
        if self._word in OPERATORS and OPERATORS[self._word] == 1:
            found = Expression(self._advance(), (found, self._chain(2)))
        self._level -= 1
        return found

    def _chain(self, binding: int) -> Expression:
        """Read what operators of one binding hold together."""
        if binding > max(OPERATORS.values()):
            return self._factor()
        found = self._chain(binding + 1)
        while self._kind == "sign" and OPERATORS.get(self._word) == binding:
            name = self._advance()
            found = Expression(name, (found, self._chain(binding + 1)))
        return found

    def _factor(self) -> Expression:
        if self._kind == "number":
            value = float(self._advance())
            if not math.isfinite(value):
                raise ConfigError(
                    "a number in a score must be at most 1.8e308: write a smaller one"
                )
            return Expression(NUMBER, (), value)
        if self._kind == "name":
            return self._named()
        if self._word not in ("-", "("):
            raise self._error("a number, a feature, a function or an opening bracket")
        if self._advance() == "-":
            self._level += 1
            if self._level > MAX_DEPTH:
                raise ConfigError(
                    f"a score must have at most {MAX_DEPTH} levels, got more: simplify it"
                )
            found = Expression("negative", (self._factor(),))
            self._level -= 1
            return found
        found = self._comparison()
        self._expect(")")
        return found

    def _named(self) -> Expression:
        name = self._advance()
        if name in FIELDS:
            return Expression(name)
        if name not in FUNCTIONS:
            raise ConfigError(
                unknown_name("feature or function of a score", name, [*FIELDS, *FUNCTIONS])
            )
        self._expect("(")
        parts = [self._comparison()]
        while self._word == ",":
            self._advance()
            parts.append(self._comparison())
        self._expect(")")
        if len(parts) != FUNCTIONS[name]:
            raise ConfigError(
                f"function {name} of a score must have {FUNCTIONS[name]} arguments, got"
                f" {len(parts)}: correct it"
            )
        return Expression(name, tuple(parts))

    def _expect(self, sign: str) -> None:
        if self._word != sign:
            raise self._error(repr(sign))
        self._advance()
