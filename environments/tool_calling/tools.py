"""The tools: pure functions of the model's arguments. What the model gets wrong becomes a text that it reads."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Number: TypeAlias = int | float
Catalogue: TypeAlias = Mapping[str, Mapping[str, Number]]
"""Facts of each product, by name."""

LONGEST_EXPRESSION = 200
LARGEST = 1e15
LARGEST_EXPONENT = 64
ERROR = "error: "

_OPERATORS: Mapping[type[ast.AST], Callable[..., Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def _function(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    _function("calculator", "Computes an arithmetic expression.", expression="For example (3 + 4) * 12 / 5"),
    _function(
        "lookup",
        "Reads one fact of a product from the catalogue.",
        product="Name of the product, such as lamp",
        field="price_eur, weight_g or stock",
    ),
]
"""As the chat template gets them."""


class ToolError(ValueError):
    """The model asked for what cannot be done."""


def run_tool(name: str, arguments: str, catalogue: Catalogue) -> str:
    """The tool's result, or `error: ...` for the model to read; never raises, whatever the model wrote.

    Args:
        arguments: a JSON object, as the model wrote it.
    """
    try:
        given = json.loads(arguments)
        if name == "calculator":
            return show(calculate(_text(given, "expression")))
        if name == "lookup":
            return show(look_up(_text(given, "product"), _text(given, "field"), catalogue))
        raise ToolError(f"there is no tool {name!r}; there are calculator and lookup")
    except (ValueError, ArithmeticError, RecursionError) as error:
        return f"{ERROR}{error}"


def calculate(expression: str) -> Number:
    """The value of an expression of numbers, + - * / // % ** and brackets; nothing else is evaluated.

    Raises:
        ToolError: it is something else, too long, or its value too large.
        ZeroDivisionError: it divides by zero.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ToolError(f"the expression is longer than {LONGEST_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ToolError(f"{expression!r} is no arithmetic expression") from error
    return _value(tree.body)


def look_up(product: str, field: str, catalogue: Catalogue) -> Number:
    """One fact of a product; upper and lower case are the same.

    Raises:
        ToolError: there is no such product or field.
    """
    facts = catalogue.get(product.strip().lower())
    if facts is None:
        raise ToolError(f"the catalogue has no {product!r}")
    if field not in facts:
        raise ToolError(f"a product has no {field!r}; it has {', '.join(facts)}")
    return facts[field]


def show(value: Number) -> str:
    """Whole numbers without a point, others with at most six places."""
    return str(int(value)) if value == int(value) else f"{value:.6f}".rstrip("0").rstrip(".")


def _value(node: ast.AST) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            result = value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            result = _OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            base, other = _value(left), _value(right)
            # Before computing it: a tower of powers would take for ever.
            if isinstance(op, ast.Pow) and abs(other) > LARGEST_EXPONENT:
                raise ToolError(f"exponents go up to {LARGEST_EXPONENT}")
            result = _OPERATORS[type(op)](base, other)
        case _:
            raise ToolError("only numbers, + - * / // % ** and brackets can be computed")
    if isinstance(result, complex) or not abs(result) <= LARGEST:
        raise ToolError(f"the value is not a number up to {LARGEST:g}")
    return result


def _text(given: Any, name: str) -> str:
    if not isinstance(given, dict) or not isinstance(given.get(name), str):
        raise ToolError(f"the tool needs the text {name!r}")
    return str(given[name])
