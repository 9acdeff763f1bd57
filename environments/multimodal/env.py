"""CountSquaresEnv: a picture in the question, its bytes beside the tokens on their way to the trainer."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Message, ScoredDataGroup
from atroposlib.errors import ConfigError
from environments.multimodal.chat_tokens import ASK_FOR_TOKENS, ChatSample, chat_samples
from environments.multimodal.pictures import CELLS, COLOURS, data_url, draw_squares
from environments.rows import held_out, load_rows, shuffled_forever

SAMPLE = Path(__file__).parent / "data" / "pictures.jsonl"
MODEL = "Qwen/Qwen2-VL-2B-Instruct"
FIELDS = {"red": int, "green": int, "blue": int, "colour": str}
_NUMBER = re.compile(r"[0-9]+")


class CountSquaresConfig(BaseEnvConfig):
    """Options of the task."""

    group_size: int = 8
    max_token_length: int = 512
    tokenizer_name: str | None = MODEL
    source: str | None = Field(
        default=None,
        description="JSONL file or hub id with red, green, blue, colour; None: the sample that comes along.",
    )
    eval_share: float = Field(default=0.25, gt=0, lt=1, description="Share of the pictures held out for evaluation.")
    max_tokens: int = Field(default=16, ge=1, description="Tokens of one answer.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")


@dataclass(frozen=True)
class Picture:
    """Squares of three colours, and the colour to count."""

    red: int
    green: int
    blue: int
    colour: str

    @property
    def answer(self) -> int:
        """How many there are of that colour."""
        return int(getattr(self, self.colour))

    @cached_property
    def image(self) -> bytes:
        """The PNG."""
        return draw_squares({colour: getattr(self, colour) for colour in COLOURS})

    @property
    def question(self) -> str:
        """The text beside the picture."""
        return f"How many {self.colour} squares are in the picture? Answer with the number only."

    @property
    def messages(self) -> list[Message]:
        """As a chat with content parts."""
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(self.image)}},
            {"type": "text", "text": self.question},
        ]
        return [{"role": "user", "content": parts}]


def reward(picture: Picture, text: str) -> float:
    """1.0 for the right number and nothing else, 0.5 for a right number among other words, else 0.0."""
    numbers = _NUMBER.findall(text)
    if len(numbers) != 1 or int(numbers[0]) != picture.answer:
        return 0.0
    return 1.0 if text.strip() == numbers[0] else 0.5


class CountSquaresEnv(BaseEnv):
    """Count the squares of one colour in a small picture; paid for the right number."""

    name = "multimodal"
    env_config_cls = CountSquaresConfig

    @classmethod
    def config_init(cls) -> tuple[CountSquaresConfig, list[APIServerConfig]]:
        """One vLLM server on this machine, with a vision model."""
        return CountSquaresConfig(), [
            APIServerConfig(base_url="http://localhost:9001/v1", model_name=MODEL, server_type="vllm")
        ]

    async def setup(self) -> None:
        """Load the pictures' descriptions; they are drawn when they are needed."""
        rows = load_rows(self.config.source or SAMPLE, fields=FIELDS)
        train, test = held_out([{**row, "key": _squares(row)} for row in rows], self.config.eval_share, "key")
        self.heldout = [picture_of(row) for row in test]
        self.pictures = shuffled_forever([picture_of(row) for row in train], self.config.seed)

    async def get_next_item(self) -> Picture:
        """The next training picture."""
        return next(self.pictures)

    async def collect_trajectories(self, item: Picture) -> tuple[ScoredDataGroup, list[Picture]]:
        """group_size answers about one picture."""
        sampling = {"temperature": self.config.temperature, "max_tokens": self.config.max_tokens}
        samples = await self.ask(item, n=self.config.group_size, **sampling)
        image = base64.b64encode(item.image).decode("ascii")
        return ScoredDataGroup(
            tokens=[sample.tokens for sample in samples],
            masks=[sample.masks for sample in samples],
            scores=[reward(item, sample.text) for sample in samples],
            inference_logprobs=[sample.logprobs for sample in samples],
            finish_reasons=[sample.finish_reason for sample in samples],
            messages=[[*item.messages, {"role": "assistant", "content": sample.text}] for sample in samples],
            images=[image] * len(samples),
            generation_params=sampling,
        ), []

    async def ask(self, picture: Picture, **sampling: Any) -> list[ChatSample]:
        """Replies of the policy with their tokens.

        Raises:
            RolloutError: the server failed, or cannot return token ids over chat.
        """
        answer = await self.server.chat_completion(messages=picture.messages, **ASK_FOR_TOKENS, **sampling)
        return chat_samples(answer)

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy answers about the held-out pictures."""
        samples = await self.evaluate_items(self.heldout, self._answer_greedily)
        metrics = {"heldout_reward": fmean(sample["score"] for sample in samples), "heldout_size": len(samples)}
        await self.evaluate_log(metrics, samples=samples, generation_parameters={"temperature": 0.0})
        return metrics

    async def _answer_greedily(self, picture: Picture) -> dict[str, Any]:
        [sample] = await self.ask(picture, temperature=0.0, max_tokens=self.config.max_tokens, split="eval")
        return {
            "question": picture.question,
            "gold_answer": str(picture.answer),
            "completion": sample.text,
            "score": reward(picture, sample.text),
        }


def picture_of(row: Mapping[str, Any]) -> Picture:
    """A row of the data.

    Raises:
        ConfigError: the picture has no room for it, or there is no such colour.
    """
    picture = Picture(**{name: row[name] for name in FIELDS})
    if picture.colour not in COLOURS or picture.red + picture.green + picture.blue > CELLS**2:
        raise ConfigError(
            f"no picture can be drawn of {row}: the colours are {', '.join(COLOURS)}, at most {CELLS**2} squares"
        )
    return picture


def _squares(row: Mapping[str, Any]) -> str:
    """The same for all questions about one picture, so that they are held out together."""
    return f"{row['red']} {row['green']} {row['blue']}"
