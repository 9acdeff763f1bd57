"""Compares short answers without a computer algebra system: numbers, fractions, roots, tuples, sets, plain text.

Pure arithmetic on floats: a hostile answer can neither run code nor take long.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

MAX_CHARACTERS = 500
"""An answer longer than this is compared as text only."""

_NOISE = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ]|[$~]")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|operatorname)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\%|%")
_NAME = re.compile(r"^\s*(?:[A-Za-z]|\\[a-z]+)\s*=\s*(?=[^=])")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_ROOT = re.compile(r"\\sqrt\s*(?:\[([^\]]*)\])?\s*(?:\{([^{}]*)\}|(\d))")
_MIXED = re.compile(r"(-?)(?<![\d.)])(\d+)\s*(?=\\[dt]?frac)")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}

_OPERATORS = {
    "\\cdot": "*",
    "\\times": "*",
    "\\div": "/",
    "\\pi": f"({math.pi})",
    "\u03c0": f"({math.pi})",
    "^": "**",
    "\u2212": "-",
    "{": "(",
    "}": ")",
}

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}


def same_answer(gold: str, answer: str, tolerance: float = 1e-6) -> bool:
    """Whether two answers mean the same.

    Args:
        tolerance: of numbers, absolute. Whole numbers must be equal.
    """
    left, right = _clean(gold), _clean(answer)
    if not left or not right:
        return False
    if _squeezed(left) == _squeezed(right):
        return True
    if max(len(left), len(right)) > MAX_CHARACTERS:
        return False
    parts = _parts(left), _parts(right)
    if parts[0] is not None and parts[1] is not None:
        return _same_parts(parts[0], parts[1], tolerance)
    if _WHOLE.fullmatch(left) and _WHOLE.fullmatch(right):  # floats take large ones for equal
        return int(left) == int(right)
    one, other = number(left), number(right)
    return one is not None and other is not None and abs(one - other) <= tolerance


def number(text: str) -> float | None:
    """The finite value of an expression of numbers, in LaTeX or plain; None where it is not one."""
    try:
        value = _value(ast.parse(_to_python(_clean(text)), mode="eval").body)
    # What the parser and the arithmetic raise on text that is no number.
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if math.isfinite(value) else None


def _clean(text: str) -> str:
    text = _NOISE.sub(" ", _WORDS.sub(r" \1 ", text)).strip().rstrip(".").strip()
    return _NAME.sub("", _DEGREES.sub("", _THOUSANDS.sub("", text))).replace("\\{", "{").replace("\\}", "}").strip()


def _squeezed(text: str) -> str:
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\s+", "", text).lower()


def _parts(text: str) -> tuple[str, list[str]] | None:
    """Brackets and comma-separated parts of a tuple, interval or set; None for a single value."""
    closing = _BRACKETS.get(text[0])
    is_closed = closing is not None and text[-1] in ")]}"
    inner, brackets = (text[1:-1], text[0] + text[-1]) if is_closed else (text, "")
    depth, parts = 0, [""]
    for letter in inner:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:  # "(1,2),(3,4)": the outer brackets are no pair
            return None
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return (brackets, parts) if len(parts) > 1 or brackets == "{}" else None


def _same_parts(left: tuple[str, list[str]], right: tuple[str, list[str]], tolerance: float) -> bool:
    if left[0] != right[0] or len(left[1]) != len(right[1]):
        return False
    if left[0] in ("{}", ""):  # a set, or a list of solutions: in any order
        rest = list(right[1])
        for part in left[1]:
            match = next((other for other in rest if same_answer(part, other, tolerance)), None)
            if match is None:
                return False
            rest.remove(match)
        return True
    return all(same_answer(one, other, tolerance) for one, other in zip(left[1], right[1], strict=True))


def _to_python(text: str) -> str:
    text = _MIXED.sub(lambda m: f"{m[1]}{m[2]}{m[1] or '+'}", text)  # 1\frac{1}{2} is 1.5
    for _ in range(text.count("frac") + text.count("sqrt")):  # innermost first
        text = _FRACTION.sub(lambda m: f"(({m[1] or m[2]})/({m[3] or m[4]}))", text)
        text = _ROOT.sub(lambda m: f"(({m[2] or m[3]})**(1/({m[1] or 2})))", text)
    for written, python in _OPERATORS.items():
        text = text.replace(written, python)
    # 2(3), 2\pi, (1)(2): a product.
    return re.sub(r"(?<=[\d)])\s*(?=\()", "*", text).strip()


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")
