"""tool_calling: tools that cannot be broken, pay for the right calls and the right number, exact tokens over the turns."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs import tokenizers
from atroposlib.errors import ConfigError
from atroposlib.testing.mock.policies import Prompt, PromptFunction
from atroposlib.type_definitions import MASKED
from environments.rows import load_rows
from environments.tool_calling import ToolCallingEnv
from environments.tool_calling.env import CATALOGUE, SAMPLE
from environments.tool_calling.rewards import Call, call_share, is_right, made_call, reward
from environments.tool_calling.tools import ERROR, TOOLS, run_tool
from tests.environments.running import Stand
from tests.processes import RolloutServerProcess

ROWS = load_rows(SAMPLE, fields={"question": str, "answer": float, "calls": list})
FACTS = {
    row["product"]: {key: value for key, value in row.items() if key != "product"}
    for row in load_rows(CATALOGUE, fields={"product": str})
}


class Solver:
    """The first, third, ... time that it is asked a question it calls the right tools and says the right number."""

    def __init__(self) -> None:
        self.rows = {row["question"]: row for row in ROWS}
        self.asked: Counter[str] = Counter()

    def __call__(self, prompt: Prompt) -> str:
        row = self.rows[prompt.last_user_text.strip()]
        if prompt.turn > 0:
            return f"It is {row['answer']}."
        self.asked[row["question"]] += 1
        if self.asked[row["question"]] % 2 == 0:
            return "Perhaps 123456789."
        return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in row["calls"])


@pytest.fixture
def stand(bytes_tokenizer: str) -> Stand:
    return Stand(
        ToolCallingEnv, PromptFunction(Solver()), bytes_tokenizer, group_size=2, max_tokens=400, max_token_length=8192
    )


# Tools and rewards


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["question"][:20])
def test_the_sample_s_calls_lead_to_its_answers(row: dict[str, Any]) -> None:
    calls = [made_call(call["name"], json.dumps(call["arguments"]), FACTS) for call in row["calls"]]

    assert is_right(calls[-1].result, row["answer"])
    assert not any(call.result.startswith(ERROR) for call in calls)


@pytest.mark.parametrize(
    ("expression", "result"),
    [("2 + 3 * 4", "14"), ("(1 - 4) ** 2", "9"), ("7 / 2", "3.5"), ("1 / 3", "0.333333"), ("-7 // 2", "-4"), ("0.1 + 0.2", "0.3")],
)  # fmt: skip
def test_the_calculator_computes(expression: str, result: str) -> None:
    assert run_tool("calculator", json.dumps({"expression": expression}), FACTS) == result


@pytest.mark.parametrize(
    "expression",
    ["", "1 / 0", "9 ** 9 ** 9", "__import__('os')", "a + 1", "(-8) ** 0.5", "True + 1", "1e400", "1 +", "1" * 201, "'a' * 9", "10 ** 16"],
)  # fmt: skip
def test_the_calculator_evaluates_nothing_else(expression: str) -> None:
    assert run_tool("calculator", json.dumps({"expression": expression}), FACTS).startswith(ERROR)


@given(
    name=st.sampled_from(["calculator", "lookup", "rm"]),
    arguments=st.text(max_size=40)
    | st.text("0123456789+-*/%.() ", max_size=40).map(lambda text: json.dumps({"expression": text})),
)
def test_no_arguments_break_a_tool(name: str, arguments: str) -> None:
    assert run_tool(name, arguments, FACTS)


def test_a_look_up_says_what_there_is() -> None:
    assert run_tool("lookup", '{"product": "Lamp ", "field": "price_eur"}', FACTS) == "24"
    assert "price_eur, weight_g, stock" in run_tool("lookup", '{"product": "lamp", "field": "colour"}', FACTS)
    assert run_tool("lookup", '{"product": "moon", "field": "stock"}', FACTS) == "error: the catalogue has no 'moon'"


A, B, C = Call("lookup", "24"), Call("calculator", "48"), Call("calculator", "7")


@pytest.mark.parametrize(
    ("made", "share"), [([A, B], 1.0), ([B, A], 1.0), ([A], 0.5), ([A, B, C, C], 0.5), ([A, A], 0.5), ([], 0.0)]
)
def test_missing_and_superfluous_calls_cost(made: list[Call], share: float) -> None:
    assert call_share(made, [A, B]) == share


def test_a_call_with_the_same_result_is_as_good() -> None:
    one, other = (made_call("calculator", json.dumps({"expression": text}), FACTS) for text in ("6 * 7", "7*6"))

    assert one == other


def test_answer_and_calls_are_paid_apart_and_a_single_turn_by_its_calls() -> None:
    assert reward([A], [A], "24 euros", 24) == 1.0
    assert reward([], [A], "24", 24) == pytest.approx(0.7)
    assert reward([A], [A], "", 24) == pytest.approx(0.3)
    assert reward([A], [A], None, 24) == 1.0


@pytest.mark.parametrize("text", ["12,960", "First 3, then 12960.", "12960.00"])
def test_the_last_number_is_the_answer(text: str) -> None:
    assert is_right(text, 12960)


# The whole environment


async def test_process_pays_right_calls_and_a_right_answer(stand: Stand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl")

    assert [sorted(group["scores"]) for group in groups] == [[0.0, 1.0]] * 2
    roles = sorted([message["role"] for message in row] for row in groups[0]["messages"])
    assert roles[0] == ["system", "user", "assistant"]
    assert {"tool"} < set(roles[1])


async def test_the_mask_holds_calls_and_answer_and_leaves_out_what_the_tools_said(
    stand: Stand, rollout_server: RolloutServerProcess, tmp_path: Path, bytes_tokenizer: str
) -> None:
    tokenizer = tokenizers.load_tokenizer(bytes_tokenizer)

    batch = await stand.leased(rollout_server, tmp_path / "run")

    for group in batch:
        assert sorted(group.scores.tolist()) == [0.0, 1.0]
        i = int(group.scores.argmax())
        span = slice(group.cu_seqlens[i], group.cu_seqlens[i + 1])
        tokens, mask = group.tokens[span], group.loss_mask[span].astype(bool)
        text = tokenizer.decode(tokens)
        [row] = [row for row in ROWS if row["question"] in text]
        calls = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in row["calls"])
        assert tokenizer.decode(tokens[mask]) == f"{calls}<|im_end|>It is {row['answer']}.<|im_end|>"
        assert "<|im_start|>tool\n" in tokenizer.decode(tokens[~mask])
        assert group.inference_logprobs is not None
        assert (group.inference_logprobs[span][mask] < 0).all()


async def test_evaluate(stand: Stand, tmp_path: Path) -> None:
    metrics, samples = await stand.evaluated(tmp_path)

    assert (metrics["heldout_reward"], metrics["heldout_right"]) == (1.0, 1.0)
    assert 0 < metrics["heldout_size"] == len(samples) < len(ROWS)


async def test_a_single_turn_ends_with_its_calls(stand: Stand, tmp_path: Path) -> None:
    stand.settings |= {"max_turns": 1}

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert sorted(group["scores"]) == [0.0, 1.0]
    assert all([message["role"] for message in row] == ["system", "user", "assistant"] for row in group["messages"])


async def test_a_reply_that_was_cut_is_truncated(stand: Stand, tmp_path: Path) -> None:
    stand.settings |= {"max_tokens": 15, "ensure_scores_are_not_same": False}

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert group["finish_reasons"] == ["length", "length"]
    assert group["scores"] == [0.0, 0.0]
    assert {len(masks) - masks.count(MASKED) for masks in group["masks"]} == {15}


async def test_a_sequence_without_room_for_another_reply_ends(stand: Stand, tmp_path: Path) -> None:
    stand.settings |= {"max_token_length": 600}

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert sorted(group["finish_reasons"]) == ["length", "stop"]
    assert sorted(group["scores"]) == [0.0, 0.3]


async def test_a_template_that_shows_no_tools_is_refused(
    stand: Stand, tmp_path: Path, tokenizer_without_tools: str
) -> None:
    stand.settings |= {"tokenizer_name": tokenizer_without_tools}

    with pytest.raises(ConfigError, match="shows the model no tools"):
        await stand.processed(tmp_path / "groups.jsonl")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "?", "answer": 1, "calls": [{"name": "lookup", "arguments": {"product": "moon"}}]},
            "mend the row's",
        ),
        ({"question": "?", "answer": "one", "calls": []}, "expected float"),
    ],
)
async def test_a_row_that_cannot_be_right_is_refused(stand: Stand, tmp_path: Path, row: Any, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{json.dumps(row)}\n{json.dumps(ROWS[1])}\n")
    stand.settings |= {"source": str(tmp_path / "rows.jsonl"), "eval_share": 0.5}

    with pytest.raises(ConfigError, match=said):
        await stand.processed(tmp_path / "groups.jsonl")


@pytest.fixture
def tokenizer_without_tools(bytes_tokenizer: str, tmp_path: Path) -> str:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(bytes_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "plain")
    return str(tmp_path / "plain")


async def test_check_env_finds_nothing(stand: Stand) -> None:
    assert await stand.check() == []


def test_tools_are_described_in_the_form_of_the_openai_api() -> None:
    assert [tool["function"]["name"] for tool in TOOLS] == ["calculator", "lookup"]
    assert all(set(tool["function"]["parameters"]["required"]) for tool in TOOLS)
