"""NumberGameEnv: one session a game, one reward a turn, an end that is either the game's or a limit's."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Message, ScoredDataGroup, ScoredDataItem
from atroposlib.errors import ConfigError
from environments.number_game.credit import centred, returns_to_go, spread
from environments.number_game.game import Game, new_game, play
from environments.rows import load_rows

HELDOUT = Path(__file__).parent / "data" / "heldout.jsonl"
RULES = (
    "I think of a whole number from 1 to {largest}. You have {max_guesses} guesses. "
    "After each I say higher or lower. Answer with your guess only."
)


class NumberGameConfig(BaseEnvConfig):
    """Options of the game."""

    group_size: int = 8
    max_token_length: int = 512
    tokenizer_name: str | None = "models/SmolLM2-135M-Instruct"
    eval_source: str | None = Field(
        default=None,
        description="JSONL file with secret and largest of held-out games; None: the one that comes along.",
    )
    largest: int = Field(default=50, ge=2, description="Training secrets lie between 1 and this.")
    max_guesses: int = Field(default=6, ge=1, description="Of a game; the player is told.")
    max_tokens: int = Field(default=16, ge=1, description="Tokens of one guess.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")
    is_credit_per_turn: bool = Field(
        default=False, description="Send an advantage for each turn instead of one for the whole game."
    )


@dataclass
class Episode:
    """One game as it was played."""

    game: Game
    messages: list[Message]
    node: Any
    """The session's sequence: tokens, mask, logprobs, versions."""
    rewards: list[float]
    """One a turn."""
    is_truncated: bool
    """A limit of length ended it, not the game."""


class NumberGameEnv(BaseEnv):
    """Guess a hidden number from the answers higher and lower; paid for bits learned and for winning."""

    name = "number_game"
    env_config_cls = NumberGameConfig

    @classmethod
    def config_init(cls) -> tuple[NumberGameConfig, list[APIServerConfig]]:
        """One vLLM server on this machine."""
        return NumberGameConfig(), [
            APIServerConfig(base_url="http://localhost:9001/v1", model_name="smollm2-135m", server_type="vllm")
        ]

    async def setup(self) -> None:
        """Load the held-out games; training games are drawn from the seed, never a held-out one."""
        rows = load_rows(self.config.eval_source or HELDOUT, fields={"secret": int, "largest": int})
        for row in rows:
            if not 1 <= row["secret"] <= row["largest"]:
                raise ConfigError(
                    f"secret {row['secret']} of a held-out game must lie from 1 to largest, {row['largest']}"
                )
        self.heldout = [new_game(row["secret"], row["largest"], self.config.max_guesses) for row in rows]
        kept = {game.secret for game in self.heldout if game.largest == self.config.largest}
        self.secrets = [secret for secret in range(1, self.config.largest + 1) if secret not in kept]
        if not self.secrets:
            raise ConfigError(
                f"every secret from 1 to largest={self.config.largest} is held out, which leaves none to train on; "
                "raise largest, or hold out fewer games"
            )
        self.random = random.Random(self.config.seed)

    async def get_next_item(self) -> Game:
        """A fresh game."""
        return new_game(self.random.choice(self.secrets), self.config.largest, self.config.max_guesses)

    async def collect_trajectories(self, item: Game) -> tuple[Any, list[Game]]:
        """A group of games about the same secret."""
        group, backlog = await super().collect_trajectories(item)
        if isinstance(group, dict) and self.config.is_credit_per_turn:
            return self._with_advantages(group), backlog
        return group, backlog

    def _with_advantages(self, group: ScoredDataGroup) -> ScoredDataGroup:
        returns: Any = group["advantages"]
        return {**group, "advantages": centred(returns, group["masks"])}

    async def collect_trajectory(self, item: Game) -> tuple[ScoredDataItem, list[Game]]:
        """One game."""
        sampling = {"temperature": self.config.temperature}
        episode = await self.play(item, **sampling)
        trajectory = ScoredDataItem(
            tokens=episode.node.tokens,
            masks=episode.node.masked_tokens,
            inference_logprobs=episode.node.logprobs,
            policy_versions=episode.node.policy_versions,
            scores=sum(episode.rewards),
            # A lost game is over; one that a limit cut short is not, and the trainer can tell by this.
            finish_reason="length" if episode.is_truncated else "stop",
            messages=episode.messages,
            generation_params=sampling,
        )
        if self.config.is_credit_per_turn:
            # Raw returns; the group is needed to make advantages of them.
            trajectory["advantages"] = spread(returns_to_go(episode.rewards), episode.node.masked_tokens)
        return trajectory, []

    async def play(self, game: Game, **sampling: Any) -> Episode:
        """Play until the game is over or the sequence has no room for another guess."""
        rules = RULES.format(largest=game.largest, max_guesses=game.max_guesses)
        messages: list[Message] = [{"role": "user", "content": rules}]
        rewards: list[float] = []
        async with self.server.managed_server(tokenizer=self.tokenizer) as session:
            while True:
                reply = await session.chat_completion(messages=messages, max_tokens=self.config.max_tokens, **sampling)
                [choice], node = reply.choices, session.get_state()["nodes"][-1]
                text = choice.message.content or ""
                turn = play(game, text)
                game = turn.game
                rewards.append(turn.reward)
                messages.append({"role": "assistant", "content": text})
                has_room = len(node.tokens) + self.config.max_tokens <= self.config.max_token_length
                is_truncated = game.status == "open" and (choice.finish_reason == "length" or not has_room)
                if game.status != "open" or is_truncated:
                    return Episode(game, messages, node, rewards, is_truncated)
                messages.append({"role": "user", "content": turn.answer})

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy games about the held-out secrets."""
        samples = await self.evaluate_items(self.heldout, self._play_greedily)
        metrics = {
            "heldout_reward": fmean(sample["score"] for sample in samples),
            "heldout_won": fmean(sample["status"] == "won" for sample in samples),
            "heldout_guesses": fmean(sample["guesses"] for sample in samples),
            "heldout_truncated": fmean(sample["is_truncated"] for sample in samples),
        }
        await self.evaluate_log(metrics, samples=samples, generation_parameters={"temperature": 0.0})
        return metrics

    async def _play_greedily(self, game: Game) -> dict[str, Any]:
        episode = await self.play(game, temperature=0.0, split="eval")
        return {
            "messages": episode.messages,
            "question": episode.messages[0]["content"],
            "gold_answer": str(game.secret),
            "score": sum(episode.rewards),
            "status": episode.game.status,
            "guesses": episode.game.guesses,
            "is_truncated": episode.is_truncated,
        }
