"""No test passes because the loop that holds all its assertions went round no time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
Loop = ast.For | ast.AsyncFor | ast.While
#: What is empty only if one of its arguments is.
_KEEPING = {"dict", "enumerate", "list", "pairwise", "reversed", "set", "sorted", "tuple", "zip"}
_CHECKS = ("fail", "raises", "warns")


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _called(node) in _CHECKS or _called(node).startswith("assert_")
    return isinstance(node, ast.Assert)


def assertions(node: ast.AST, loops: tuple[Loop, ...] = ()) -> Iterator[tuple[Loop, ...]]:
    """Find assertions below a node; of each, the loops around it."""
    if _asserts(node):
        yield loops
    for child in ast.iter_child_nodes(node):
        inside = isinstance(node, Loop) and child in node.body
        yield from assertions(child, (*loops, node) if inside else loops)


class Known:
    """What is assigned to the names of a file."""

    def __init__(self, tree: ast.Module) -> None:
        self._values: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._add(target, node.value)
            elif isinstance(node, ast.AnnAssign) and node.value:
                self._add(node.target, node.value)

    def _add(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._values.setdefault(target.id, []).append(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=False):
                self._add(one, its)

    def is_filled(self, node: ast.expr, depth: int = 0) -> bool:
        """Whether it is plain that there is something in it."""
        if depth > 8:
            return False
        match node:
            case ast.Constant():
                return bool(node.value)
            case ast.List() | ast.Tuple() | ast.Set():
                plain = [x for x in node.elts if not isinstance(x, ast.Starred)]
                spread = [x.value for x in node.elts if isinstance(x, ast.Starred)]
                return bool(plain) or any(self.is_filled(x, depth + 1) for x in spread)
            case ast.Dict():
                return bool(node.keys)
            case ast.Name():
                values = self._values.get(node.id, [])
                return bool(values) and all(self.is_filled(v, depth + 1) for v in values)
            case ast.IfExp():
                return all(self.is_filled(v, depth + 1) for v in (node.body, node.orelse))
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return all(
                    not part.ifs and self.is_filled(part.iter, depth + 1)
                    for part in node.generators
                )
            case ast.BinOp(op=ast.Add()):
                return any(self.is_filled(v, depth + 1) for v in (node.left, node.right))
            case ast.BinOp(op=ast.Mult() | ast.BitOr()):
                return self.is_filled(node.left, depth + 1)
            case ast.Call() if _called(node) == "range":
                return self._is_long(node)
            case ast.Call() if _called(node) in _KEEPING | {"product"}:
                return bool(node.args) and all(self.is_filled(x, depth + 1) for x in node.args)
            case ast.Call(func=ast.Attribute(value=value, attr="items" | "keys" | "values")):
                return self.is_filled(value, depth + 1)
        return False

    def _is_long(self, node: ast.Call) -> bool:
        """Whether a range has something in it, whatever the numbers it is made of."""
        names = {n.id for part in node.args for n in ast.walk(part) if isinstance(n, ast.Name)}
        known = {
            name: values[0].value
            for name, values in self._values.items()
            if len(values) == 1 and isinstance(values[0], ast.Constant)
        }
        code = compile(ast.Expression(node), "range", "eval")
        try:
            return all(
                len(eval(code, {"range": range}, dict.fromkeys(names, some) | known)) > 0
                for some in (0, 1, 7)
            )
        except (NameError, TypeError, ValueError):
            return False


def suspects(tree: ast.Module) -> list[str]:
    """Name the tests whose every assertion stands in a loop that may go round no time.

    Tests of drawn examples are left out: an empty one is among many.
    """
    known, found = Known(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        if any(isinstance(d, ast.Call) and _called(d) == "given" for d in node.decorator_list):
            continue
        around = list(assertions(node))
        sure = (
            all(not isinstance(loop, ast.While) and known.is_filled(loop.iter) for loop in loops)
            for loops in around
        )
        if around and not any(sure):
            found.append(node.name)
    return found


def test_all_assertions_of_a_test_do_not_stand_in_a_loop_that_may_be_empty():
    found = {
        str(path.relative_to(TESTS)): names
        for path in sorted(TESTS.rglob("*.py"))
        if (names := suspects(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert not found, f"assert before the loop that there is something in it: {found}"


def test_the_check_sees_what_it_is_for():
    tree = ast.parse(
        "ROWS = [1, 2]\n"
        "def test_a():\n    for x in rows():\n        assert x\n"
        "def test_b():\n    assert rows()\n    for x in rows():\n        assert x\n"
        "def test_c():\n    for x in ROWS:\n        assert x\n"
        "def test_d(n):\n    for x in range(3 * n, 3 * n + 3):\n        assert_fine(x)\n"
        "def test_e(n):\n    for x in range(n):\n        assert x\n"
        "def test_f():\n    while more():\n        assert thing()\n"
        "def test_g():\n    for x in ROWS:\n        for y in x:\n            assert y\n"
        "@given(rows())\ndef test_h(rows):\n    for x in rows:\n        assert x\n"
    )
    assert suspects(tree) == ["test_a", "test_e", "test_f", "test_g"]
