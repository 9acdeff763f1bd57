"""BaseEnv: what an environment author writes, and the helpers that make it short."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from atroposlib.envs.config import BaseEnvConfig
from atroposlib.envs.evaluation import print_metrics, write_evaluation
from atroposlib.envs.grouping import merge_trajectories
from atroposlib.envs.rollouts import Reward, rollout_group, sample_texts
from atroposlib.envs.server_handling.managed_server import SequenceNode
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig, ServerBaseline
from atroposlib.envs.server_handling.server_manager import ServerManager, ServerManagerConfig
from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.errors import RolloutError
from atroposlib.type_definitions import UUID, Item, Message, ScoredDataGroup, ScoredDataItem

log = logging.getLogger(__name__)

TRAJECTORY_TRIES = 3


class EvalHandlingEnum(Enum):
    """Upstream's choices of what training does during an evaluation. Rollouts are never cancelled here."""

    STOP_TRAIN = "STOP_TRAIN"
    LIMIT_TRAIN = "LIMIT_TRAIN"
    NONE = "NONE"


class BaseEnv(ABC):
    """A task for a language model. Subclass it, write get_next_item and one of collect_*, and call `cli()`.

    Args:
        config: an instance of env_config_cls.
        server_configs: the inference servers, as config_init returns them.
    """

    name: ClassVar[str | None] = None
    env_config_cls: ClassVar[type[BaseEnvConfig]] = BaseEnvConfig
    server_cls: ClassVar[type[APIServer]] = APIServer  # type: ignore[type-abstract]

    def __init__(
        self,
        config: BaseEnvConfig,
        server_configs: ServerBaseline | list[APIServerConfig],
        slurm: bool = False,
        testing: bool = False,
    ) -> None:
        self.config: Any = config
        """Any, because subclasses have their own config class and read its fields here."""
        self.server = ServerManager(server_configs, slurm=slurm, testing=testing, server_class=self.server_cls)
        self.tokenizer: Any = load_tokenizer(config.tokenizer_name) if config.tokenizer_name else None
        self.curr_step = 0
        self.max_token_len = -1
        self.process_mode = False
        self.completion_lengths: list[int] = []
        self.rollouts_for_wandb: deque[list[tuple[str, float]]] = deque(maxlen=config.num_rollouts_to_keep)
        self.metrics_sink: Callable[[dict[str, Any]], None] | None = None
        """Where wandb_log puts metrics; whoever runs the environment sets it."""
        self.eval_metrics: dict[str, Any] | None = None
        """Result of the newest evaluation that was logged."""

    # What an author writes

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, ServerBaseline | list[APIServerConfig]]:
        """Defaults of this environment: its config and its inference servers."""
        return cls.env_config_cls(), ServerBaseline()

    async def setup(self) -> None:
        """Load data; called once before anything else."""
        return

    @abstractmethod
    async def get_next_item(self) -> Item:
        """The next thing to roll out; None when there is nothing now."""

    async def collect_trajectory(self, item: Item) -> tuple[ScoredDataItem | None, list[Item]]:
        """Roll out one trajectory of an item; the list holds items to roll out later."""
        raise NotImplementedError(
            f"{type(self).__name__} must define collect_trajectories (a whole group) or collect_trajectory (one sequence)"
        )

    async def collect_trajectories(
        self, item: Item
    ) -> tuple[ScoredDataGroup | list[ScoredDataGroup | None] | None, list[Item]]:
        """Roll out a group of an item.

        By default group_size calls of collect_trajectory; those whose infrastructure fails are tried again.
        """
        results = await asyncio.gather(*(self._collect_with_retries(item) for _ in range(self.config.group_size)))
        valid = [result for result in results if result is not None]
        if len(valid) < self._min_valid:
            raise RolloutError(
                f"{len(valid)} of {self.config.group_size} trajectories succeeded, {self._min_valid} are needed"
            )
        backlog = [later for _, more in valid for later in more]
        return merge_trajectories([trajectory for trajectory, _ in valid]), backlog  # type: ignore[misc]

    async def postprocess_histories(self, trajectories: Any) -> Any:
        """Change a group before it is sent; identity by default."""
        return trajectories

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """Measure the policy; return the metrics, or hand them to evaluate_log."""
        log.info("%s defines no evaluation", self.display_name)
        return None

    async def cleanup(self) -> None:
        """Called after every group."""
        return

    # What an author calls

    async def rollout_group(
        self, messages: Sequence[Message], *, reward: Reward, prefill: str = "", **sampling: Any
    ) -> ScoredDataGroup:
        """Sample group_size replies in one request and pay each with `reward(text)`.

        Args:
            prefill: text that every reply is made to begin with.
            sampling: temperature (1.0), max_tokens, top_p, stop, ...
        """
        return await rollout_group(
            self.server,
            self.tokenizer,
            messages,
            reward=reward,
            group_size=self.config.group_size,
            min_valid=self._min_valid,
            prefill=prefill,
            **sampling,
        )

    async def sample(
        self, messages: Sequence[Message], *, prefill: str = "", **sampling: Any
    ) -> list[tuple[str, SequenceNode]]:
        """Sample replies (n=1 unless given) over the same token route as rollouts: text and exact tokens of each."""
        return await sample_texts(self.server, self.tokenizer, messages, prefill=prefill, **sampling)

    async def evaluate_log(
        self,
        metrics: dict[str, Any],
        task_name: str | None = None,
        model_name: str | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
        generation_parameters: dict[str, Any] | None = None,
        samples: list[dict[str, Any]] | None = None,
        verbose: bool = True,
    ) -> None:
        """Keep an evaluation's result: metrics.json and samples.jsonl in data_dir_to_save_evals, the metrics in the run's records."""
        self.eval_metrics = dict(metrics)
        task_name = task_name or f"{self.display_name}_eval"
        if verbose:
            print_metrics(task_name, metrics)
        if self.config.data_dir_to_save_evals is None:
            log.info("data_dir_to_save_evals is not set: no evaluation files are written")
            return
        write_evaluation(
            Path(self.config.data_dir_to_save_evals),
            metrics,
            task_name=task_name,
            model_name=model_name or self.server.servers[0].config.model_name,
            start_time=start_time,
            end_time=end_time or time.time(),
            generation_parameters={"max_new_tokens": self.config.max_token_length, **(generation_parameters or {})},
            samples=samples,
        )

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        """Log metrics of this step. Override to add your own, then call super().wandb_log(metrics)."""
        metrics = dict(wandb_metrics or {})
        if self.completion_lengths:
            lengths, self.completion_lengths = self.completion_lengths, []
            metrics["train/completion_lengths"] = sum(lengths) / len(lengths)
            metrics["train/completion_lengths_max"] = max(lengths)
        if metrics and self.metrics_sink is not None:
            self.metrics_sink(metrics)

    @classmethod
    def cli(cls) -> None:
        """Command line of the environment: serve, process, evaluate."""
        from atroposlib.envs.cli import main

        main(cls)

    # What the machinery uses

    @property
    def display_name(self) -> str:
        """wandb_name, else name, else the class name."""
        return self.config.wandb_name or self.name or type(self).__name__

    @property
    def _min_valid(self) -> int:
        return int(self.config.min_valid_per_group or self.config.group_size)

    async def _collect_with_retries(self, item: Item) -> tuple[ScoredDataItem | None, list[Item]] | None:
        for attempt in range(TRAJECTORY_TRIES):
            try:
                return await self.collect_trajectory(item)
            except RolloutError as error:
                log.warning("trajectory failed, attempt %d of %d: %s", attempt + 1, TRAJECTORY_TRIES, error)
        return None


__all__ = [
    "UUID",
    "APIServer",
    "APIServerConfig",
    "BaseEnv",
    "BaseEnvConfig",
    "EvalHandlingEnum",
    "Item",
    "Message",
    "ScoredDataGroup",
    "ScoredDataItem",
    "ServerBaseline",
    "ServerManager",
    "ServerManagerConfig",
]
