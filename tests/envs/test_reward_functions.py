"""What each bundled reward pays for."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.reward_fns import math_answers, registry
from atroposlib.envs.reward_fns.accuracy_reward import AccuracyReward, accuracy_reward
from atroposlib.envs.reward_fns.answers import boxed, final_answer, gold_answer
from atroposlib.envs.reward_fns.cascading_r1_math_reward import cascading_r1_math_reward
from atroposlib.envs.reward_fns.chandas_meter_reward import ChandasMeterReward, syllables
from atroposlib.envs.reward_fns.cosine_scaled_reward import CosineScaledReward
from atroposlib.envs.reward_fns.crossword_format_reward import CrosswordFormatReward, crossword_format_reward
from atroposlib.envs.reward_fns.format_reward import FormatReward, format_reward
from atroposlib.envs.reward_fns.plain_math import number, same_answer
from atroposlib.envs.reward_fns.r1_reward import (
    AccuracyXReward,
    FormatReasoningReward,
    format_reasoning_reward,
    parse_reasoning_response,
    r1_reward,
)
from atroposlib.envs.reward_fns.reasoning_steps_reward import ReasoningStepsReward, reasoning_steps_reward
from atroposlib.envs.reward_fns.repetition_penalty_reward import RepetitionPenaltyReward, repetition_penalty_reward
from atroposlib.errors import ConfigError, RolloutError

# Answers in text


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{1} then \boxed {\frac{1}{2}}", ["1", r"\frac{1}{2}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{a \boxed{b} c}", [r"a \boxed{b} c", "b"]),
        (r"never \boxed{closed", []),
        ("} \\boxed 3", []),
    ],
)
def test_boxes_are_read_with_their_braces_matched(text: str, contents: list[str]) -> None:
    assert boxed(text) == contents


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"#### 3, so $x=4$ and \boxed{5}", "5"),
        ("work\n#### 3\n$4$", "3"),
        (r"first $1$ and then \(2\)", "2"),
        ("the answer is 42", None),
    ],
)
def test_the_final_answer_is_boxed_or_hashed_or_the_last_formula(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("gold", "bare"), [("6*7\n#### 42", "42"), (r"so \boxed{42}", "42"), ("$42$", "42"), (42, "42")]
)
def test_gold_answers_are_unwrapped(gold: Any, bare: str) -> None:
    assert gold_answer(gold) == bare


def test_openings_without_an_end_cost_little() -> None:
    hostile = r"\boxed{" * 20_000 + r"\(" * 20_000

    assert final_answer(hostile) is None


# Answers compared without algebra


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "42.0"),
        ("0.5", r"\frac{1}{2}"),
        ("0.5", r"\dfrac12"),
        ("1/2", "0.5000000001"),
        ("1234567", "1,234,567"),
        ("1.5", r"1\frac{1}{2}"),
        ("-1.5", r"-1\frac{1}{2}"),
        ("007", "+7"),
        (r"\sqrt{2}", "2^{1/2}"),
        ("3", r"\sqrt[3]{27}"),
        (r"2\pi", "6.283185307"),
        ("12", r"3 \times 4"),
        ("-3", "\u22123"),
        ("50", r"50\%"),
        ("90", r"90^\circ"),
        ("5", "x = 5"),
        ("7", r"\text{ 7 }."),
        ("(1, 2)", r"\left( 1,\, 2.0 \right)"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("1, 2", "2, 1"),
        ("x+1", "X + 1"),
        ("[0,1)", "[0, 1)"),
    ],
)
def test_the_same_answer_in_another_form(gold: str, answer: str) -> None:
    assert same_answer(gold, answer)
    assert same_answer(answer, gold)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "43"),
        ("12345678", "12345679"),
        ("9007199254740992", "9007199254740993"),
        ("0.33", "1/3"),
        ("42", ""),
        ("(1, 2)", "(2, 1)"),
        ("(0, 1)", "[0, 1]"),
        ("{1, 2}", "{1, 1}"),
        ("1, 2", "1, 2, 3"),
        ("x", "y"),
        ("1", "__import__('os')"),
        ("1", "9**9**9**9"),
        ("1", "1" + "+0" * 1000),
        ("1", "(" * 400),
    ],
)
def test_another_answer(gold: str, answer: str) -> None:
    assert not same_answer(gold, answer)


@given(top=st.integers(-999, 999), bottom=st.integers(1, 999))
def test_fractions_have_their_value_however_written(top: int, bottom: int) -> None:
    for written in (f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", f"{top / bottom!r}".replace("e", "*10^")):
        assert number(written) == pytest.approx(top / bottom)


@given(text=st.text(alphabet="0123456789+-*/^(){}[],.$\\ fracsqtpi", max_size=40))
def test_no_text_breaks_the_comparison(text: str) -> None:
    assert isinstance(same_answer("1", text), bool)
    assert isinstance(boxed(text), list)


# Accuracy


@pytest.fixture(params=[False, True], ids=["plain", "math-verify"])
def checker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compare; the second where it is installed."""
    if request.param:
        pytest.importorskip("math_verify")
    else:
        monkeypatch.setattr(math_answers, "has_math_verify", lambda: False)


@pytest.mark.usefixtures("checker")
@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"<think>\boxed{1}</think> it is \boxed{42}", 1.0),
        (r"<think>\boxed{42}</think> it is \boxed{1}", 0.0),
        ("so\n#### 42.0", 1.0),
        ("$42$", 1.0),
        ("no idea", 0.0),
        (r"\boxed{42}" * 6, 1.0),
        (r"\boxed{42}" * 7, 0.0),
        (r"<think>" + r"\boxed{42}" * 7 + r"</think>\boxed{42}", 1.0),
    ],
)
def test_accuracy_pays_for_the_right_final_answer(text: str, reward: float) -> None:
    assert AccuracyReward()([text], solution="#### 42") == [reward]


def test_accuracy_can_look_at_the_thinking_too() -> None:
    assert AccuracyReward(split_on_think_tag=False)([r"\boxed{42}</think>"], solution="42") == [1.0]


def test_accuracy_has_a_tolerance() -> None:
    assert AccuracyReward(tolerance=0.1)([r"\boxed{3.1}"], solution="3.14159") == [1.0]
    assert AccuracyReward()([r"\boxed{3.1}"], solution="3.14159") == [0.0]


def test_each_completion_has_its_answer_and_the_ground_truth_comes_first() -> None:
    texts = [r"\boxed{1}", r"\boxed{2}"]

    assert accuracy_reward(texts, solution=["1", "3"]) == [1.0, 0.0]
    assert accuracy_reward(texts, solution="1", ground_truth=2) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("known", "message"), [({}, "pass solution= or ground_truth="), ({"solution": ["1", "2"]}, "2 answers for 1")]
)
def test_an_answer_that_is_missing_is_an_error_and_not_a_wrong_answer(known: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        AccuracyReward()(["x"], **known)


@pytest.mark.usefixtures("checker")
def test_the_cascade_pays_for_the_form_only_with_the_right_answer() -> None:
    replies = [
        r"<think>a</think>\boxed{42}",
        r"\boxed{42}",
        r"<think>a</think>\boxed{41}",
        r"<think>a<b></think>\boxed{42}",
    ]

    assert cascading_r1_math_reward(replies, solution="42") == [1.5, 1.0, 0.0, 1.0]
    assert registry.create("cascading_r1_math")(replies, solution="42") == [1.5, 1.0, 0.0, 1.0]


# math-verify


def install_math_verify(monkeypatch: pytest.MonkeyPatch, verify: Any) -> None:
    from types import ModuleType

    errors: Any = ModuleType("math_verify.errors")
    errors.TimeoutException = type("TimeoutException", (BaseException,), {})
    library: Any = ModuleType("math_verify")
    library.LatexExtractionConfig = lambda **kwargs: kwargs
    library.parse = lambda text, **kwargs: [text]
    library.verify = lambda *args, **kwargs: verify(errors.TimeoutException)
    monkeypatch.setitem(sys.modules, "math_verify", library)
    monkeypatch.setitem(sys.modules, "math_verify.errors", errors)
    monkeypatch.setattr(math_answers, "has_math_verify", lambda: True)


def test_a_grader_that_ran_out_of_time_says_nothing_about_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(timed_out: type[BaseException]) -> bool:
        raise timed_out

    install_math_verify(monkeypatch, runs_out)

    with pytest.raises(RolloutError, match="within 5 s"):
        AccuracyReward()(["$x$"], solution="y")


def test_algebra_is_left_to_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    install_math_verify(monkeypatch, lambda timed_out: True)

    assert AccuracyReward()(["$1+x$"], solution="x+1") == [1.0]


def test_text_that_math_verify_cannot_read_is_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(timed_out: type[BaseException]) -> bool:
        raise NotImplementedError

    install_math_verify(monkeypatch, cannot)

    assert AccuracyReward()(["$?$"], solution="x") == [0.0]


# Form


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        ({}, "<THINK>a\nb</THINK>", 1.0),
        ({}, "<answer>a", 0.0),
        ({"require_all_tags": True}, "<think>a</think>", 0.0),
        ({"require_all_tags": True}, "<think>a</think><answer>b</answer>", 1.0),
        ({"case_sensitive": True}, "<THINK>a</THINK>", 0.0),
        ({"preferred_tags": ["plan"]}, "<think>a</think>", 0.0),
    ],
)
def test_format_looks_for_tags(options: dict[str, Any], text: str, reward: float) -> None:
    assert FormatReward(**options)([text]) == [reward]


def test_the_old_functions_are_the_classes_with_their_defaults() -> None:
    assert format_reward(["<plan>a</plan>"], preferred_tags=["plan"]) == [1.0]
    assert format_reasoning_reward(["<think>a</think>b"]) == [0.5]
    assert r1_reward(["<think>a</think>b"], solution="b") == [1.5]
    assert reasoning_steps_reward(["too short"]) == [0.0]
    assert repetition_penalty_reward(["too short"]) == [-0.1]
    assert crossword_format_reward(["1-Across: CAT"]) == [1.0]


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        ({}, "<think>a</think>b", 0.5),
        ({"reward_value": 2.0}, "<think>a</think>b", 2.0),
        ({}, "<think>a</think>", 0.0),
        ({"require_response": False}, "<think>a</think>", 0.5),
        ({}, "<think></think>b", 0.0),
        ({"require_thinking": False}, "b", 0.5),
        ({}, "<think>a</think>b<think>c</think>d", 0.0),
        ({"allow_multiple_thinking": True}, "<think>a</think>b<think>c</think>d", 0.5),
    ],
)
def test_reasoning_has_a_shape(options: dict[str, Any], text: str, reward: float) -> None:
    assert FormatReasoningReward(**options)([text]) == [reward]


def test_a_reply_is_split_into_thinking_and_response() -> None:
    assert parse_reasoning_response("<think>\na\n</think>\nb") == {"thinking_content": "a", "response": "b"}
    assert parse_reasoning_response(" b ") == {"thinking_content": "", "response": "b"}


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        ({}, "<think>no</think>it is PARIS", 1.0),
        ({}, "<think>paris</think>no", 0.0),
        ({}, "<think>paris", 0.0),
        ({"case_sensitive": True}, "PARIS", 0.0),
        ({"exact_match": True}, "it is Paris", 0.0),
        ({"exact_match": True, "reward_value": 0.3}, " paris ", 0.3),
    ],
)
def test_the_solution_is_looked_for_after_the_thinking(options: dict[str, Any], text: str, reward: float) -> None:
    assert AccuracyXReward(**options)([text], solution="Paris") == [reward]


def test_an_empty_solution_is_not_contained_in_everything() -> None:
    with pytest.raises(RolloutError, match="empty"):
        AccuracyXReward()(["x"], solution=" ")


def test_crossword_answers_have_a_form() -> None:
    texts = ["1-Across: CAT", "3D: dog.", "Down 12: BEE", "1-Across: C4T", "CAT"]

    assert CrosswordFormatReward()(texts) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert CrosswordFormatReward(penalize_invalid_chars=False, reward_value=0.5)(texts) == [0.5, 0.5, 0.5, 0.5, 0.0]
    assert CrosswordFormatReward(format_patterns=[r"=(\w+)="], valid_chars="xyz")(["=XY=", "=ab="]) == [1.0, 0.0]


# Style

FILLER = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (FILLER, 0.1),
        ("one two", 0.0),
        (f"{FILLER} Step 1 x Step 2 x Step 3 x", 0.6),
        (f"{FILLER}\n1. a\n2) b\n3. c", 0.6),
        (f"{FILLER}\n- a\n* b\n- c", 0.5),
        (f"{FILLER} first", 0.2),
        (f"{FILLER}\n1. step 1 first\n2. step 2 then\n3. step 3 so finally\n- a\n- b\n- c", 1.0),
    ],
)
def test_reasoning_in_steps_is_paid_by_its_marks(text: str, reward: float) -> None:
    assert ReasoningStepsReward()([text]) == pytest.approx([reward])


def test_kinds_of_steps_have_weights_and_unknown_ones_are_named() -> None:
    assert ReasoningStepsReward(pattern_weights={"transitions": 0.9}, base_score=0.0, min_steps=1)(
        [f"{FILLER} then"]
    ) == [0.9]
    with pytest.raises(ConfigError, match="dashes"):
        ReasoningStepsReward(pattern_weights={"dashes": 1.0})


VARIED = "A quick fox jumps over lazy dogs. Bright stars shine above quiet hills tonight. Nobody heard music yesterday."


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        (VARIED, 0.0, 0.0),
        ("Too short.", -0.1, -0.1),
        (f"{VARIED} {VARIED}", -0.8, -0.8),  # half of the sentences were there before
        ("I see cats. I see dogs. I see birds. I see fish. I see bees.", -0.99, -0.1),
        ("go " * 30 + ". stop " + "go " * 30, -1.0, -1.0),
    ],
)
def test_repetition_costs_by_its_amount(text: str, low: float, high: float) -> None:
    [reward] = RepetitionPenaltyReward()([text])

    assert low - 1e-9 <= reward <= high + 1e-9


@given(text=st.text(alphabet="ab .", max_size=200))
def test_repetition_costs_at_most_one(text: str) -> None:
    [reward] = RepetitionPenaltyReward()([text])

    assert -1.0 <= reward <= 0.0


def test_a_higher_threshold_forgives() -> None:
    text = "I see cats. I see dogs. I see birds. I see fish. I see bees."

    assert RepetitionPenaltyReward(threshold=0.9)([text]) == [0.0]
    with pytest.raises(ConfigError, match="threshold=1"):
        RepetitionPenaltyReward(threshold=1)
    with pytest.raises(ConfigError, match="letters"):
        RepetitionPenaltyReward(component_weights={"letters": 1.0})


# Meaning


def letters(texts: Any) -> list[list[float]]:
    return [[text.count("a"), text.count("b")] for text in texts]


def test_closeness_is_scaled_and_clamped() -> None:
    texts = ["a", "b", "ab", ""]

    assert CosineScaledReward(embed=letters)(texts, solution="a") == pytest.approx([1.0, 0.0, 0.5**0.5, 0.0])
    assert CosineScaledReward(embed=letters, scale_factor=3.0)(["b"], solution="a") == [-1.0]
    assert CosineScaledReward(embed=letters, max_reward=0.5)(["a"], solution="a") == [0.5]
    assert CosineScaledReward(embed=letters, default_reward=-0.2)([""], solution="a") == [-0.2]


def test_a_missing_package_names_the_extra_and_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    with pytest.raises(ConfigError, match=r"atroposlib\[trainer\]"):
        CosineScaledReward()(["a"], solution="a")


# Verse


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("agnimīḷe purohitaṁ", 8),
        ("yajñasya devamṛtvijam", 8),
        ("अग्निमीळे पुरोहितं", 8),
        ("वैश्वानराय", 5),
        ("12 ?!", 0),
    ],
)
def test_syllables_are_counted_in_both_scripts(text: str, count: int) -> None:
    assert syllables(text) == count


def test_quarters_in_the_metre_are_paid_for() -> None:
    stanza = "agnimīḷe purohitaṁ\nyajñasya devamṛtvijam |\nhotāraṁ ratnadhātamam ||"

    assert ChandasMeterReward(meter="gayatri")([stanza]) == [1.0]
    assert ChandasMeterReward()([stanza]) == [0.0]
    with pytest.raises(ConfigError, match="'limerick'"):
        ChandasMeterReward(meter="limerick")
