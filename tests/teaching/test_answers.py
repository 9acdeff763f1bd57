"""The student's answer in its text, and whether guidance gives the right one away."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.reward_fns.leaks import gives_away, normalised
from atroposlib.teaching.answers import correctness, extract_answer, teaching_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"So \boxed{12}, no: \boxed{42}. The answer is 7.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<solution>3</solution> then <solution>It is 42.</solution> 99", "42"),
        ("<solution>The answer is 1,234.50 dollars, not 7.</solution>", "1234.50"),
        ("<solution>Paris</solution>", "paris"),
        ("The answer is Paris. It is nice.", "paris"),
        ("Answer: 17", "17"),
        ("The answer is 5. No, the answer is 7.", "7"),
        ("The answer is 5.\nI am sure that the answer is correct.", "5"),
        ("The answer is Rome. No: the answer is Paris.", "paris"),
        ("I get 5. The answer is ", "5"),
        ("<solution>3/4</solution>", "0.75"),
        ("The answer is 7/2.", "7/2"),
        ("It makes 1e5", "1e5"),
        ("The answer is .5", "0.5"),
        ("x = .25 of it", "0.25"),
        ("I took 3.Then 4.", "4"),
        ("3 + 4 = 7, so she has 7 apples and 2 friends", "7"),
        ("10 - 4 = 6 and 6 * 2 = 12 of 30", "12"),
        ("Therefore, she has 15 left, out of 20 apples.", "15"),
        ("Thus 3 + 4 makes 1,007.5. It had 9.", "1007.50"),
        ("First 3, then 5.", "5"),
        ("It is -8", "-8"),
        ("I do not know", ""),
        ("", ""),
        ("<solution>cut off 42", "42"),
        ("<solution></solution>", ""),
    ],
)
def test_the_answer_is_found(text: str, expected: str) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("42.0", "42"), ("1,500", "1500"), ("2.5", "2.50"), (" $7$. ", "7"), ("New  York", "new york")],
)
def test_answers_are_normalised(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


@given(st.text(max_size=200))
def test_no_text_breaks_the_extraction(text: str) -> None:
    answer = extract_answer(text)

    assert normalised(answer) is not None
    assert correctness(answer, "42") in (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("It is 42", "42", 1.0),
        ("42.0", "#### 42", 1.0),
        ("41", "42", 0.0),
        ("", "42", 0.0),
        (r"\boxed{0.5}", r"\frac12", 1.0),
        ("<solution>3/4</solution>", "4", 0.0),
        ("<solution>3/4</solution>", "0.75", 1.0),
        ("The answer is 1/2.", "1", 0.0),
        ("The answer is 1/2.", r"\frac{1}{2}", 1.0),
        ("The answer is 7/2.", "3.5", 1.0),
        ("It makes 1e5", "100000", 1.0),
        ("It makes 1e5", "5", 0.0),
        ("It is 0.004", "0.001", 0.0),
        ("It is 0.001", "1e-3", 1.0),
        ("It is 0.3333", "1/3", 1.0),
        ("It is 0.34", "1/3", 0.0),
        ("It is 0", "0.0", 1.0),
    ],
)
def test_right_and_wrong(text: str, truth: str, right: float) -> None:
    assert correctness(extract_answer(text), truth) == right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<thinking>It is 42.</thinking><teaching> Add the tens. </teaching><teaching>no</teaching>", "Add the tens."),
        ("Add the tens.", "Add the tens."),
        ("<thinking>It is 42.</thinking> Add the tens.", "Add the tens."),
        ("<thinking>It is 42, and", ""),
        ("<thinking>Say <teaching>42</teaching>?</thinking><teaching>Add the tens.</teaching>", "Add the tens."),
        ("<THINKING>Say <teaching>42</teaching>?</THINKING>Add the tens.", "Add the tens."),
        ("<thinking>Hm. <teaching>Add the tens.</teaching>", "Add the tens."),
        ("<teaching>Add the", "Add the"),
        ("<teaching></teaching> more", ""),
        ("", ""),
    ],
)
def test_the_student_sees_the_teaching_and_never_the_private_thoughts(text: str, expected: str) -> None:
    assert teaching_of(text) == expected


@pytest.mark.parametrize(
    ("teaching", "truth", "leaks"),
    [
        ("17 + 25 is 42", "42", True),
        ("you get 42.0", "42", True),
        ("it is 1,500", "1500", True),
        ("do 50-42", "42", True),
        ("look at page 421", "42", False),
        ("42cm of rope", "42", True),
        ("the formula is Q42", "42", False),
        ("Step 4: look again.\n4. Check it.", "4", False),
        ("Step 42: look again.", "42", True),
        ("Use rule 42.", "42", True),
        ("42. That is it.", "42", True),
        ("Step 41: write 42.", "42", True),
        ("it is 40, or 42.5, or 3.42", "42", False),
        ("add 17 and 25", "17", False),
        ("subtract 3", "3", False),
        ("Think of Paris!", "Paris", True),
        ("Think of Parisian cafes", "Paris", False),
        ("a tree is a plant", "A", False),
        ("the answer is A", "A", True),
        ("choose (a)", "A", True),
        ("", "42", False),
        ("Use 0.004.", "0.001", False),
        ("It is 0.001.", "0.001", True),
        ("so 0.75", "3/4", True),
        ("so 3/4", "3/4", True),
        ("so 6 / 8", "3/4", True),
        ("so 3/4", r"\frac{3}{4}", True),
        (r"so \frac34", r"\frac{3}{4}", True),
        ("so 0.3333", "1/3", True),
        ("so -0.5", "-1/2", True),
        ("so -1/2", r"-\frac12", True),
        ("so 50", "50%", True),
        ("it makes 1e5", "100000", True),
        ("it is .5", "0.5", True),
        ("take 3 of the 4 parts", "3/4", False),
        ("calculate 84/2", "42", False),
        ("take 1 of each", "3-2", False),
        ("it was 3-2", "3-2", True),
    ],
)
def test_guidance_that_states_the_answer_is_a_leak(teaching: str, truth: str, leaks: bool) -> None:
    question, approach = "What is 17 + 25?", "I would add 3."

    assert gives_away(teaching, truth, question=question, approach=approach) is leaks


NUMERIC = st.text(alphabet="0123456789.,/\\frac{}eE-+%$ step", max_size=40)


@given(guidance=NUMERIC, truth=NUMERIC, question=NUMERIC)
def test_no_text_breaks_the_leak_rule_and_what_the_question_says_is_none(
    guidance: str, truth: str, question: str
) -> None:
    assert gives_away(guidance, truth, question=question, approach="") in (True, False)
    assert not gives_away(guidance, truth, question=guidance, approach="")


@given(top=st.integers(1, 99), bottom=st.integers(2, 99))
def test_a_fraction_is_given_away_in_every_notation(top: int, bottom: int) -> None:
    for said in (f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}", f"{top / bottom:.6f}"):
        assert gives_away(f"so {said}", f"{top}/{bottom}", question="q", approach="")
