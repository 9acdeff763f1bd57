"""Prompts: only the known names are replaced, and a template without what it needs is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.errors import ConfigError
from atroposlib.teaching.items import item_of
from atroposlib.teaching.templates import DEFAULTS, REQUIRED, Template, format_doubt
from environments.teaching.env import TeachingConfig

STUDENTS = ("student_baseline_template", "student_with_teaching_template")


@pytest.mark.parametrize("name", REQUIRED)
def test_the_built_in_templates_have_what_they_need(name: str) -> None:
    template = Template.of(name, None)

    assert template.doubts() == []
    assert all(f"{{{variable}}}" in DEFAULTS[name] for variable in REQUIRED[name])


def test_both_solutions_are_asked_for_in_one_format() -> None:
    assert all("<solution>" in DEFAULTS[name] for name in STUDENTS)


@pytest.mark.parametrize(("name", "variable"), [(name, v) for name, needed in REQUIRED.items() for v in needed])
def test_a_missing_variable_is_refused_by_name(name: str, variable: str) -> None:
    text = DEFAULTS[name].replace(f"{{{variable}}}", "")

    with pytest.raises(ConfigError, match=rf"{name} must contain \{{{variable}\}}"):
        Template.of(name, text)


def test_a_misspelt_variable_is_pointed_out() -> None:
    with pytest.raises(ConfigError, match=r"it has \{qestion\}"):
        Template.of("student_baseline_template", "{qestion}")


def test_a_name_that_looks_like_an_optional_variable_is_doubted(caplog: pytest.LogCaptureFixture) -> None:
    Template.of("student_diagnostic_template", "{question} {step_contxt}")

    assert "{step_contxt} is no variable and stays as it is; did you mean {step_context}?" in caplog.text


@pytest.mark.parametrize("name", ["solution", "ground_truth", "answer", "task", "x", "hint2"])
def test_a_name_in_braces_that_is_no_variable_is_doubted_and_stays(name: str, caplog: pytest.LogCaptureFixture) -> None:
    template = Template.of("student_baseline_template", f"{{question}} {{{name}}}")

    assert template.render({"question": "q", name: "7"}) == f"q {{{name}}}"
    assert f"{{{name}}} is no variable and stays as it is; the variables are {{question}}" in caplog.text


def test_a_line_break_that_a_shell_left_as_it_was_is_no_latex() -> None:
    assert (
        "{solution} is no variable" in Template.of("student_baseline_template", r"{question}\n{solution}").doubts()[0]
    )


@pytest.mark.parametrize(
    "rest", ["\\boxed{answer} \\frac{a}{b}", '{"a": 1}', "{X} {an answer} {}", "{teaching} {step_context} {tool}"]
)
def test_latex_and_other_braces_and_variables_are_not_doubted(rest: str) -> None:
    assert Template.of("student_with_teaching_template", f"{{question}} {{teaching}} {rest}").doubts() == []


def format_doubt_of(baseline: str | None, with_teaching: str | None) -> str | None:
    return format_doubt(
        *(Template.of(name, text) for name, text in zip(STUDENTS, (baseline, with_teaching), strict=True))
    )


@pytest.mark.parametrize(
    "form",
    ["in <answer></answer>", "in \\boxed{}", "after ####", "Answer: N", "**Answer**: N", "End with: The answer is N"],
)
def test_an_answer_that_the_students_are_asked_for_in_different_forms_is_doubted(form: str) -> None:
    baseline, taught = f"{{question}} {form}", f"{{question}} {{teaching}} {form}"

    assert "student_with_teaching_template by <solution>" in (format_doubt_of(baseline, None) or "")
    assert "student_baseline_template asks for the answer by <solution>" in (format_doubt_of(None, taught) or "")
    assert "by no known form:" in (format_doubt_of(baseline, "{question} {teaching}") or "")
    assert format_doubt_of(baseline, taught) is None


def test_templates_that_share_a_form_or_name_none_are_not_doubted() -> None:
    config = TeachingConfig()

    assert format_doubt_of(None, None) is None
    assert format_doubt_of("{question} as \\boxed{} in <solution></solution>", None) is None
    assert format_doubt_of(config.student_baseline_template, config.student_with_teaching_template) is None


@pytest.mark.parametrize("name", REQUIRED)
def test_the_templates_of_the_ready_environment_are_not_doubted(name: str) -> None:
    assert TeachingConfig().template(name).doubts() == []


@given(question=st.text(alphabet="{}[]\"'aquestion:,\\ \n", max_size=40))
def test_no_brace_in_a_value_is_touched(question: str) -> None:
    template = Template.of("teacher_adaptive_template", 'Q: {question} {{x}} {"json": {approach}} {unknown}')

    rendered = template.render({"question": question, "approach": "{question}"})

    assert rendered == f'Q: {question} {{{{x}}}} {{"json": {{question}}}} {{unknown}}'


def test_a_question_that_holds_json_is_rendered() -> None:
    rendered = Template.of("student_baseline_template", None).render({"question": 'Return {"a": {"b": 1}} sorted.'})

    assert 'Return {"a": {"b": 1}} sorted.' in rendered


def test_the_built_in_template_tells_the_teacher_how_able_the_student_is() -> None:
    rendered = Template.of("teacher_adaptive_template", None).render({"question": "q", "approach": "a", "tier": "low"})

    assert "How able the student seems at it: low" in rendered


def test_the_diagnosis_does_not_come_from_the_data() -> None:
    item = item_of({"prompt": "q", "ground_truth": "4", "tier": "gold", "tool": "abacus"})

    assert item.context == {"tool": "abacus"}


def test_what_is_no_text_is_written_as_json_and_what_is_absent_stays_empty() -> None:
    template = Template.of("student_diagnostic_template", "{question}|{tool}|{tool_params}|{step_context}")

    rendered = template.render({"question": "q", "tool_params": {"ä": [1]}, "step_context": None})

    assert rendered == 'q||{"ä": [1]}|'


def test_rendering_without_a_needed_value_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no value of approach"):
        Template.of("teacher_adaptive_template", None).render({"question": "q"})


def test_the_digest_changes_with_the_text() -> None:
    texts = ("{question}", "{question} ", "{question}")
    one, other, same = (Template.of("student_baseline_template", text).digest for text in texts)

    assert one == same != other
