"""ToolCallingEnv: the model calls tools, reads their results, and says a number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataItem
from atroposlib.errors import ConfigError
from environments.rows import held_out, load_rows, shuffled_forever
from environments.tool_calling.rewards import Call, is_right, made_call, reward
from environments.tool_calling.tools import ERROR, TOOLS

SAMPLE = Path(__file__).parent / "data" / "questions.jsonl"
CATALOGUE = SAMPLE.with_name("catalogue.jsonl")
SYSTEM = "Use the tools to find out what you need. Then answer in one sentence that ends with the number."


class ToolCallingConfig(BaseEnvConfig):
    """Options of the task."""

    group_size: int = 8
    max_token_length: int = 2048
    tokenizer_name: str | None = "Qwen/Qwen3-0.6B"
    source: str | None = Field(
        default=None,
        description="JSONL file or hub id with question, answer, calls; None: the sample that comes along.",
    )
    catalogue: str | None = Field(
        default=None, description="JSONL file with product, price_eur, weight_g, stock; None: the one that comes along."
    )
    eval_share: float = Field(default=0.25, gt=0, lt=1, description="Share of the questions held out for evaluation.")
    max_turns: int = Field(default=4, ge=1, description="Replies of an episode; 1: the first reply's calls are paid.")
    max_tokens: int = Field(default=256, ge=1, description="Tokens of one reply.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")
    tool_parser: str = Field(default="hermes", description="How the model writes its calls.")


@dataclass(frozen=True)
class Question:
    """What is asked, the number to be said, and the calls that it takes."""

    text: str
    answer: float
    needed: tuple[Call, ...]


@dataclass
class Episode:
    """What became of a question."""

    node: Any
    """The session's sequence: tokens, mask, logprobs, versions."""
    messages: list[dict[str, Any]]
    made: list[Call]
    final_text: str | None
    """None in a single turn."""
    is_cut: bool
    """A limit of length ended it."""


class ToolCallingEnv(BaseEnv):
    """Answer questions about numbers and products with two tools; paid for the right calls and the right number."""

    name = "tool_calling"
    env_config_cls = ToolCallingConfig

    @classmethod
    def config_init(cls) -> tuple[ToolCallingConfig, list[APIServerConfig]]:
        """One vLLM server on this machine."""
        return ToolCallingConfig(), [
            APIServerConfig(base_url="http://localhost:9001/v1", model_name="Qwen/Qwen3-0.6B", server_type="vllm")
        ]

    async def setup(self) -> None:
        """Load questions and catalogue, and make sure that the model will see the tools."""
        self.server.tool_parser = self.config.tool_parser
        shown = self.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tools=TOOLS, tokenize=False)
        if "calculator" not in shown:
            raise ConfigError(
                f"the chat template of {self.config.tokenizer_name!r} shows the model no tools; "
                "use a model that was trained for tools, such as Qwen/Qwen3-0.6B"
            )
        facts = load_rows(self.config.catalogue or CATALOGUE, fields={"product": str})
        self.catalogue = {row["product"]: {key: row[key] for key in row if key != "product"} for row in facts}
        rows = load_rows(self.config.source or SAMPLE, fields={"question": str, "answer": float, "calls": list})
        train, test = held_out(rows, self.config.eval_share, "question")
        self.heldout = [self._question(row) for row in test]
        self.questions = shuffled_forever([self._question(row) for row in train], self.config.seed)

    def _question(self, row: dict[str, Any]) -> Question:
        calls = [made_call(call["name"], json.dumps(call["arguments"]), self.catalogue) for call in row["calls"]]
        for call in calls:
            if call.result.startswith(ERROR):
                raise ConfigError(
                    f"{row['question']!r}: the call of {call.name} gives {call.result!r}; mend the row's calls"
                )
        return Question(row["question"], row["answer"], tuple(calls))

    async def get_next_item(self) -> Question:
        """The next training question."""
        return next(self.questions)

    async def collect_trajectory(self, item: Question) -> tuple[ScoredDataItem, list[Question]]:
        """One episode."""
        sampling = {"temperature": self.config.temperature}
        episode = await self.play(item, **sampling)
        return ScoredDataItem(
            tokens=episode.node.tokens,
            masks=episode.node.masked_tokens,
            inference_logprobs=episode.node.logprobs,
            policy_versions=episode.node.policy_versions,
            scores=reward(episode.made, item.needed, episode.final_text, item.answer),
            finish_reason="length" if episode.is_cut else "stop",
            messages=episode.messages,
            generation_params=sampling,
        ), []

    async def play(self, question: Question, **sampling: Any) -> Episode:
        """Let the model call tools until it answers without a call, or a limit is reached."""
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question.text},
        ]
        made: list[Call] = []
        async with self.server.managed_server(tokenizer=self.tokenizer) as session:
            for turns_left in reversed(range(self.config.max_turns)):
                reply = await session.chat_completion(
                    messages=messages, tools=TOOLS, max_tokens=self.config.max_tokens, **sampling
                )
                [choice], node = reply.choices, session.get_state()["nodes"][-1]
                text, calls = choice.message.content or "", choice.message.tool_calls or []
                messages.append({"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})})
                results = self._run(calls)
                made += results
                has_room = len(node.tokens) + self.config.max_tokens <= self.config.max_token_length
                is_cut = choice.finish_reason == "length" or bool(calls and turns_left and not has_room)
                if not calls or is_cut or not turns_left:
                    break
                messages += tool_messages(calls, results)
        final_text = None if self.config.max_turns == 1 else "" if calls else text
        return Episode(node, messages, made, final_text, is_cut)

    def _run(self, calls: Sequence[dict[str, Any]]) -> list[Call]:
        return [made_call(call["function"]["name"], call["function"]["arguments"], self.catalogue) for call in calls]

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy episodes over the held-out questions."""
        samples = await self.evaluate_items(self.heldout, self._answer_greedily)
        metrics = {
            "heldout_reward": fmean(sample["score"] for sample in samples),
            "heldout_right": fmean(sample["is_correct"] for sample in samples),
            "heldout_calls": fmean(sample["calls"] for sample in samples),
            "heldout_size": len(samples),
        }
        await self.evaluate_log(metrics, samples=samples, generation_parameters={"temperature": 0.0})
        return metrics

    async def _answer_greedily(self, question: Question) -> dict[str, Any]:
        episode = await self.play(question, temperature=0.0, split="eval")
        return {
            "messages": episode.messages,
            "question": question.text,
            "gold_answer": str(question.answer),
            "score": reward(episode.made, question.needed, episode.final_text, question.answer),
            "is_correct": is_right(episode.final_text or "", question.answer),
            "calls": len(episode.made),
        }


def tool_messages(calls: Sequence[dict[str, Any]], results: Sequence[Call]) -> list[dict[str, Any]]:
    """What the tools said, as the model reads it."""
    return [
        {"role": "tool", "tool_call_id": call["id"], "content": result.result}
        for call, result in zip(calls, results, strict=True)
    ]
