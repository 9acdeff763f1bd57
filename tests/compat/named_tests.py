"""Finds a test by FILE::NAME, for tables that say where something is tested."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def find_test(place: str) -> Function:
    """A function of a file under tests/, of the module or of one of its classes of tests.

    Raises:
        LookupError: there is none, so that pytest does not run it either.
    """
    path, _, name = place.partition("::")
    module = _parsed(TESTS / path)
    classes = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
    for body in (module.body, *(test_class.body for test_class in classes)):
        for node in body:
            if isinstance(node, Function) and node.name == name and name.startswith("test_"):
                return node
    raise LookupError(f"{place} is no test")


def can_fail(test: Function) -> bool:
    """Whether it asserts something, or expects an exception or a warning."""
    nodes = list(ast.walk(test))
    expected = {node.attr for node in nodes if isinstance(node, ast.Attribute)} & {"raises", "warns"}
    return bool(expected) or any(isinstance(node, ast.Assert) for node in nodes)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
