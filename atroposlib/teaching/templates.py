"""The four prompts of the protocol: which variables each one needs, and rendering that no brace can break."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from atroposlib.errors import ConfigError

log = logging.getLogger(__name__)

STUDENT_DIAGNOSTIC = """Here is a problem. Do not solve it yet.

{question}

Say in a few words how you would go about it:
Type: what kind of problem it is
Steps: the main steps, in order
Difficulties: where you might go wrong"""

TEACHER_ADAPTIVE = """A student is about to solve this problem:

{question}

This is how the student means to go about it:

{approach}

How able the student seems at it: {tier}

Help the student to get it right.
First think for yourself between <thinking> and </thinking>: is the approach right, and what is missing? The student does not see this.
Then write to the student between <teaching> and </teaching>. If the approach is right, one short sentence is enough. If it is wrong or \
has gaps: walk a student of low ability through the steps that are missing, give one of medium ability hints, and one of high ability \
a remark at most. Never state the final answer."""

STUDENT_WITH_TEACHING = """{question}

A teacher gives you this advice:

{teaching}

Use the advice where it helps. Solve the problem step by step, then give the final answer alone between <solution> and </solution>."""

STUDENT_BASELINE = """{question}

Solve the problem step by step, then give the final answer alone between <solution> and </solution>."""

CONTEXT = ("step_context", "tool", "tool_params")
DIAGNOSED = ("tier", "capability_level", "identified_gaps")
"""Variables of teacher_adaptive_template that come from the diagnosis, not from the data."""
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "student_diagnostic_template": CONTEXT,
    "teacher_adaptive_template": ("step_context", "guidance_history", "validation", "tool", "tool_params", *DIAGNOSED),
    "student_with_teaching_template": ("step_context", "guidance_history", "validation", "tool", "tool_params"),
    "student_baseline_template": (),
}
"""Variables that a template may use; an item that has none of them leaves the place empty."""
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "student_diagnostic_template": ("question",),
    "teacher_adaptive_template": ("question", "approach"),
    "student_with_teaching_template": ("question", "teaching"),
    "student_baseline_template": ("question",),
}
DEFAULTS: Mapping[str, str] = {
    "student_diagnostic_template": STUDENT_DIAGNOSTIC,
    "teacher_adaptive_template": TEACHER_ADAPTIVE,
    "student_with_teaching_template": STUDENT_WITH_TEACHING,
    "student_baseline_template": STUDENT_BASELINE,
}
ANSWER_MARKERS: Mapping[str, re.Pattern[str]] = {
    "<solution>": re.compile("<solution>", re.I),
    "<answer>": re.compile("<answer>", re.I),
    "\\boxed": re.compile(r"\\boxed\b"),
    "####": re.compile("####"),
    "Answer:": re.compile(r"\banswer\W{0,3}:", re.I),
    "the answer is": re.compile(r"\bthe (?:final )?answer is\b", re.I),
}
"""Forms in which answers are commonly asked for."""
_LIKE_A_VARIABLE = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]{2,}(?:\{[^{}]*\})+")
r"""Its braces hold arguments: \boxed{answer}, \frac{a}{b}. A \n of one letter is a line break that a shell left as it was."""
_NEAR = 0.75


@dataclass(frozen=True)
class Template:
    """One prompt.

    Args:
        name: of the option that holds it, one of REQUIRED.
        text: None for the built-in one.
    Raises:
        ConfigError: a variable that it needs is missing.
    """

    name: str
    text: str

    @classmethod
    def of(cls, name: str, text: str | None) -> Template:
        """The template of an option; None is the built-in one."""
        return cls(name, DEFAULTS[name] if text is None else text)

    def __post_init__(self) -> None:
        for variable in REQUIRED[self.name]:
            if f"{{{variable}}}" not in self.text:
                near = difflib.get_close_matches(variable, _LIKE_A_VARIABLE.findall(self.text), n=1, cutoff=_NEAR)
                hint = f"; it has {{{near[0]}}}, which is no variable" if near else ""
                raise ConfigError(f"{self.name} must contain {{{variable}}}{hint}")
        for doubt in self.doubts():
            log.warning("%s", doubt)

    @property
    def variables(self) -> tuple[str, ...]:
        """Every name that is replaced."""
        return (*REQUIRED[self.name], *OPTIONAL[self.name])

    @property
    def digest(self) -> str:
        """Changes when the text does."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def doubts(self) -> list[str]:
        """Names in braces that are no variable, arguments of LaTeX left aside: they stay in the prompt as they are."""
        written = set(_LIKE_A_VARIABLE.findall(_LATEX_COMMAND.sub("", self.text))) - set(self.variables)
        return [
            f"{self.name}: {{{name}}} is no variable and stays as it is; {self._hint(name)}" for name in sorted(written)
        ]

    def _hint(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.variables, n=1, cutoff=_NEAR)
        if near:
            return f"did you mean {{{near[0]}}}?"
        return f"the variables are {', '.join(f'{{{variable}}}' for variable in self.variables)}"

    def answer_markers(self) -> list[str]:
        """Which of ANSWER_MARKERS it has."""
        return [name for name, pattern in ANSWER_MARKERS.items() if pattern.search(self.text)]

    def render(self, values: Mapping[str, Any]) -> str:
        """The prompt. Only the known names are replaced, all at once: braces in values and elsewhere stay.

        Args:
            values: anything but a string is written as JSON; None and absent optional ones leave the place empty.
        Raises:
            ConfigError: a value of a variable that it needs is missing.
        """
        absent = [name for name in REQUIRED[self.name] if values.get(name) is None]
        if absent:
            raise ConfigError(f"{self.name} cannot be rendered: no value of {', '.join(absent)}")
        return self._places.sub(lambda place: _as_text(values.get(place[1])), self.text)

    @cached_property
    def _places(self) -> re.Pattern[str]:
        return re.compile(r"\{(" + "|".join(self.variables) + r")\}")


def format_doubt(baseline: Template, with_teaching: Template) -> str | None:
    """What to say where the two ask for the answer in different forms; None where they share one, or neither names any."""
    alone, taught = baseline.answer_markers(), with_teaching.answer_markers()
    if alone == taught or set(alone) & set(taught):
        return None
    return (
        f"{baseline.name} asks for the answer by {_listed(alone)}, {with_teaching.name} by {_listed(taught)}: "
        "ask in the same form in both, or the form is what guidance is paid for"
    )


def _listed(markers: list[str]) -> str:
    return " and ".join(markers) or "no known form"


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
