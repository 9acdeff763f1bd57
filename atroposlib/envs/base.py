"""BaseEnv: what an environment author writes, overrides and calls. The machinery behind it lives in the modules beside."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from atroposlib.envs import wandb_logging
from atroposlib.envs.blocking import BlockingPool
from atroposlib.envs.checkpoints import load_state, save_state
from atroposlib.envs.config import BaseEnvConfig
from atroposlib.envs.eval_handling import EvalHandlingEnum, last_crossed
from atroposlib.envs.eval_items import evaluate_items
from atroposlib.envs.evaluation import print_metrics, write_evaluation
from atroposlib.envs.metrics import completion_lengths, length_metrics, server_metrics, timing_metrics, with_prefix
from atroposlib.envs.rollouts import Reward, rollout_group, sample_texts
from atroposlib.envs.server_handling.engines.reasoning import ReasoningConfig
from atroposlib.envs.server_handling.managed_server import SequenceNode
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig, ServerBaseline
from atroposlib.envs.server_handling.server_manager import ServerManager, ServerManagerConfig
from atroposlib.envs.serving import sending
from atroposlib.envs.serving.delivery import drop_reason
from atroposlib.envs.serving.grouping import collect_group
from atroposlib.envs.serving.groups_file import GroupsFile
from atroposlib.envs.serving.run_link import RunLink
from atroposlib.envs.serving.run_status import StatusDict, derived_batch_size
from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.errors import ConfigError, RolloutDeadlineError
from atroposlib.type_definitions import MASKED, UUID, Item, Message, ScoredDataGroup, ScoredDataItem

log = logging.getLogger(__name__)

OpenaiConfig = APIServerConfig
"""An older name that environments import."""
TIMING_WINDOW = 4096
_UNFILTERED = ("empty", "wrong_size", "zero_variance")
"""Reasons to drop a group before its completion lengths count."""

T = TypeVar("T")
R = TypeVar("R")


class BaseEnv(ABC):
    """A task for a language model. Subclass it, write get_next_item and one of collect_*, and call `cli()`.

    Args:
        config: an instance of env_config_cls.
        server_configs: the inference servers, as config_init returns them.
        slurm: find the inference servers from the SLURM variables.
        testing: replace the inference servers by canned answers.
    Raises:
        ValueError: reasoning_effort is none that exists.
        ConfigError: there is no such tokenizer, or no inference server is named.
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
        self.server = ServerManager(
            server_configs,
            slurm=slurm,
            testing=testing,
            server_class=self.server_cls,
            reasoning_config=ReasoningConfig.from_env_config(config),
        )
        self.tokenizer: Any = load_tokenizer(config.tokenizer_name) if config.tokenizer_name else None
        self._init_progress()
        self._init_figures()
        self.metrics_sink: Callable[[dict[str, Any]], None] | None = None
        """Where wandb_log puts metrics, wandb or not; whoever runs the environment sets it."""
        self.logged_evaluation: dict[str, Any] | None = None
        """Result of the newest evaluation that was logged."""
        self._evaluation_started: float | None = None
        self.run_link: RunLink | None = None
        """The loop that runs this environment; None outside of serve."""
        self._blocking = BlockingPool(config.blocking_workers)

    def _init_progress(self) -> None:
        self.curr_step = 0
        self.max_token_len = -1
        """Tokens of the longest sequence the trainer accepts; -1: no limit."""
        self.max_num_workers: int = self.config.resolve_max_num_workers(len(self.server.servers))
        self.env_id: int | None = None
        self.status_dict: StatusDict | None = None
        self.checkpoint_dir = ""
        self.checkpoint_interval = -1
        self.wandb_project: str | None = None
        self.wandb_group: str | None = None
        self.wandb_prepend: str | None = None
        self.process_mode = False
        self.n_groups_to_process: int | None = None
        self.group_size_to_process: int | None = None
        self.workers: set[asyncio.Task[Any]] = set()
        """Groups in flight."""
        self.eval_workers: set[asyncio.Task[Any]] = set()
        self.eval_runner: asyncio.Task[Any] | None = None
        self.backlog: list[Item] = []
        """Items to roll out before new ones; the newest first."""
        self.running_items: dict[UUID, dict[str, Any]] = {}
        """By the id that handle_env gets: `item`, `start_time` (monotonic seconds)."""
        self.last_loop_time: float | None = None
        self.last_completed_item: Item = None

    def _init_figures(self) -> None:
        """Samples since the last log; bounded, should an environment never log."""
        self.completion_lengths: list[int] = []
        self.rollouts_for_wandb: list[Any] = []
        self.items_sent_this_step = 0
        self.task_duration: deque[float] = deque(maxlen=TIMING_WINDOW)
        self.succeeded_task_duration: deque[float] = deque(maxlen=TIMING_WINDOW)
        self.failed_task_duration: deque[float] = deque(maxlen=TIMING_WINDOW)
        self.task_successful: deque[int] = deque(maxlen=TIMING_WINDOW)
        self.mainloop_timings: deque[float] = deque(maxlen=TIMING_WINDOW)
        self.workers_added_list: deque[int] = deque(maxlen=TIMING_WINDOW)

    # What an author writes

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, ServerBaseline | list[APIServerConfig]]:
        """Defaults of this environment: its config and its inference servers."""
        return cls.env_config_cls(), ServerBaseline()

    @classmethod
    def server_pools(cls) -> dict[str, ServerBaseline | list[APIServerConfig] | None]:
        """Pools of servers beside the policy's, by name, with their default servers; None: from flags or a file.

        A pool NAME has flags `--NAME.*` and a section of the YAML file. A constructor that names NAME_server_configs gets it,
        any other asks server_pools.handed_over(NAME).
        """
        return {}

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

        By default group_size calls of collect_trajectory. Those whose infrastructure fails are tried again; a member
        that fails for good, or is None, is left out, as long as min_valid_per_group allows.
        """
        return await collect_group(
            self.collect_trajectory, item, group_size=self.config.group_size, min_valid=self._min_valid
        )

    async def postprocess_histories(self, trajectories: Any) -> Any:
        """Change a group, or a list of groups, before it is sent; identity by default."""
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

    async def run_blocking(
        self, call: Callable[..., T], *args: Any, timeout_s: float = 60.0, in_process: bool = False
    ) -> T:
        """Run a blocking function, such as a grader, without holding up the other rollouts.

        Args:
            timeout_s: seconds it may run.
            in_process: on a process of its own, which can be killed and has a main thread (math-verify needs one);
                then the function and its arguments must be picklable. Else on a thread.
        Raises:
            RolloutError: it took longer: no signal, so the rollout is tried again or left out, not paid 0.
        """
        return await self._blocking.run(call, *args, timeout_s=timeout_s, in_process=in_process)

    async def evaluate_items(
        self, items: Sequence[T], evaluate: Callable[[T], Awaitable[R]], *, journal_path: Path | None = None
    ) -> list[R]:
        """Evaluate every item, max_eval_workers at once; results in the order of the items.

        Args:
            journal_path: where finished items are kept, so that an interrupted evaluation goes on; see eval_items.
        Raises:
            ExceptionGroup: an item failed. A partial evaluation is not a result.
        """
        self._evaluation_started = time.time()
        return await evaluate_items(
            items,
            evaluate,
            journal_path=journal_path,
            max_workers=self.config.max_eval_workers if self.config.max_eval_workers > 0 else max(1, len(items)),
            run_key=f"{self._model_name} step {self.curr_step}",
        )

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
        """Keep an evaluation's result: metrics.json and samples.jsonl in data_dir_to_save_evals, the metrics in the run's records.

        Args:
            start_time, end_time: seconds since the epoch; from the newest evaluate_items until now, where they are absent.
        """
        self.logged_evaluation = dict(metrics)
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
            model_name=model_name or getattr(self.config, "model_name", None) or self._model_name,
            start_time=start_time or self._evaluation_started,
            end_time=end_time,
            generation_parameters={"max_new_tokens": self.config.max_token_length, **(generation_parameters or {})},
            samples=samples,
        )

    # Metrics

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        """Log metrics of this step. Override to add your own, then call super().wandb_log(metrics)."""
        metrics = dict(wandb_metrics or {})
        lengths, self.completion_lengths = self.completion_lengths, []
        metrics |= length_metrics(lengths, max_token_len=self.max_token_len)
        if self.run_link is not None:
            metrics |= self.run_link.metrics()
        metrics = self.perf_stats(metrics)
        if metrics and self.metrics_sink is not None:
            self.metrics_sink(metrics)
        if wandb_logging.is_active():
            metrics = await self.create_rollout_table(metrics)
            servers = await server_metrics(self.server.servers)
            wandb_logging.log_metrics({**with_prefix(self.wandb_prepend, metrics), **servers}, step=self.curr_step)

    def perf_stats(self, metrics_dict: dict[str, Any]) -> dict[str, Any]:
        """Add durations (seconds) and counts of groups since the last log, and start them anew."""
        samples: dict[str, deque[Any]] = {
            "task_duration": self.task_duration,
            "succeeded_task_duration": self.succeeded_task_duration,
            "failed_task_duration": self.failed_task_duration,
            "mainloop_timings": self.mainloop_timings,
            "workers_added_per_attempt": self.workers_added_list,
        }
        metrics_dict |= timing_metrics(samples)
        if self.task_successful:
            sent = sum(self.task_successful)
            metrics_dict["train/items_sent_to_api"] = sent
            metrics_dict["train/items_rejected"] = len(self.task_successful) - sent
        for window in (*(window for window in samples.values() if len(window) > 1), self.task_successful):
            window.clear()
        return metrics_dict

    async def create_rollout_table(self, wandb_metrics: dict[str, Any]) -> dict[str, Any]:
        """Add `train/rollouts`: a wandb table of sample texts and scores."""
        if self.rollouts_for_wandb and (table := wandb_logging.rollout_table(self.rollouts_for_wandb)) is not None:
            wandb_metrics["train/rollouts"] = table
        return wandb_metrics

    async def add_rollouts_for_wandb(
        self, scored_data: ScoredDataGroup | list[ScoredDataGroup], item: Item = None
    ) -> None:
        """Keep a few decoded sequences of each group for the table."""
        count = self.config.num_rollouts_per_group_for_logging
        for group in sending.as_groups(scored_data):  # type: ignore[arg-type]
            n = len(group["tokens"]) if count == -1 else count
            self.rollouts_for_wandb.append(sending.sample_rows(group, self.tokenizer, count=n))
        sending.keep_newest(self.rollouts_for_wandb, self.config.num_rollouts_to_keep)

    # One group

    async def handle_env(self, item_uuid: UUID) -> Any:
        """Roll out `running_items[item_uuid]`, send what came of it, and return it; None when nothing did.

        Raises:
            RolloutError: infrastructure failed, or group_deadline_s was over.
        """
        item = self.running_items[item_uuid]["item"]
        start, data = time.monotonic(), None
        try:
            data = await self._roll_out(item)
            if data:
                await self.handle_send_to_api(data, item, do_send_to_api=not self.process_mode)
                self.last_completed_item = item
        finally:
            seconds = time.monotonic() - start
            self.task_duration.append(seconds)
            self.task_successful.append(1 if data else 0)
            (self.succeeded_task_duration if data else self.failed_task_duration).append(seconds)
            self.running_items.pop(item_uuid, None)
            await self.cleanup()
        return data

    async def _roll_out(self, item: Item) -> Any:
        """Collect and postprocess within the group's deadline; sending has no part in it."""
        deadline_s = self.config.resolve_group_deadline_s()
        try:
            async with asyncio.timeout(deadline_s) as scope:
                outcome, backlog = sending.split_result(await self.collect_trajectories(item))
                self.backlog.extend(backlog)
                return await self.postprocess_histories(outcome) if outcome else None
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise RolloutDeadlineError(f"the group took longer than {deadline_s} s (group_deadline_s)") from error

    async def handle_send_to_api(
        self,
        scored_data: ScoredDataGroup | list[ScoredDataGroup | None] | None,
        item: Item = None,
        do_send_to_api: bool = True,
        abort_on_any_max_length_exceeded: bool = True,
    ) -> None:
        """Check groups, keep samples of them, write them to the groups file, and send them.

        Override it to enrich or divert groups, and call super() with what is to be sent.
        """
        limit = self.max_token_len if abort_on_any_max_length_exceeded else -1
        kept = []
        for group in sending.as_groups(scored_data):
            reason = drop_reason(group, self.config, max_token_len=limit)
            lengths = completion_lengths(group["masks"], masked=MASKED)
            if self.run_link is not None:
                self.run_link.note_group(group, lengths, reason)
            if reason not in _UNFILTERED:
                self.completion_lengths += lengths
            if reason is not None:
                facts = {"group_size": self.config.group_size, "max_token_len": limit}
                sending.say_dropped(self.display_name, group, reason, **facts)
                continue
            await self._note_sample(group, item)
            kept.append(group)
        if do_send_to_api and kept:
            await self._send_scored_data_to_api(kept)

    async def _note_sample(self, group: ScoredDataGroup, item: Item) -> None:
        sending.fill_absent(group)
        if self.config.include_messages:
            sending.fill_messages(group, self.tokenizer)
        # Decoding costs more than all the rest: the base's own samples are made only where somebody shows them.
        if self.config.use_wandb or type(self).add_rollouts_for_wandb is not BaseEnv.add_rollouts_for_wandb:
            await self.add_rollouts_for_wandb(group, item)
        if self.jsonl_writer is not None:
            self.jsonl_writer.write(group)

    async def _send_scored_data_to_api(self, scored_data: list[ScoredDataGroup]) -> None:
        await self._link.send(scored_data)

    @cached_property
    def jsonl_writer(self) -> GroupsFile | None:
        """The groups file, opened for the first group; None where no path is set."""
        if self.config.data_path_to_save_groups is None:
            return None
        writer = GroupsFile(Path(self.config.data_path_to_save_groups))
        self.config.data_path_to_save_groups = str(writer.path)
        return writer

    # Life cycle

    async def register_env(self) -> None:
        """Join the run; waits for a trainer. Where training has taken steps already, load_checkpoint follows."""
        info = await self._link.join()
        run = info.run
        self.env_id = info.env_id
        self.wandb_project, self.wandb_group = run.request.wandb_project, run.request.wandb_group
        self.wandb_prepend = self.display_name
        self.checkpoint_dir = run.request.checkpoint_dir
        self.checkpoint_interval = run.request.save_checkpoint_interval
        # Where an environment joins a running run it has crossed no evaluation step yet.
        self.curr_step = run.acknowledged_step
        if self.curr_step > 0:
            self.load_checkpoint()

    async def get_server_info(self) -> None:
        """Take over the trainer's batch size and longest sequence.

        Raises:
            ConfigError: a group does not fit into a batch.
        """
        request = (await self._link.join()).run.request
        self.max_token_len = request.max_token_len
        self.config.batch_size = request.batch_size
        if self.config.group_size > request.batch_size:
            raise ConfigError(
                f"group_size={self.config.group_size} is larger than the trainer's batch_size={request.batch_size}; "
                "lower --group_size, or raise the batch size"
            )

    async def setup_wandb(self) -> None:
        """Open a wandb run under the trainer's project; where that cannot be, use_wandb is switched off."""
        if not self.config.use_wandb:
            return
        self.config.use_wandb = wandb_logging.open_run(
            project=self.wandb_project,
            group=self.wandb_group,
            name=wandb_logging.run_name(self.config.wandb_name),
            config=self.config.model_dump(mode="json", fallback=str),
        )

    async def get_status(self) -> None:
        """Ask where the run stands: status_dict."""
        self.status_dict = await self._link.status()
        # Servers join and leave while the environment runs.
        self.max_num_workers = self.config.resolve_max_num_workers(len(self.server.servers))

    async def env_step_checks(self) -> None:
        """Evaluation, checkpoint and log of a step that was reached; called when the step may have changed."""
        before, after = self.curr_step, int((self.status_dict or {}).get("current_step", self.curr_step))
        if after == before:
            return
        self.curr_step = after
        if last_crossed(before, after, self.config.steps_per_eval) is not None:
            self._link.start_evaluation(after)
        checkpoint = last_crossed(before, after, self.checkpoint_interval)
        if checkpoint is not None:
            self.save_checkpoint(checkpoint)
        if self.items_sent_this_step >= self.config.min_items_sent_before_logging:
            self.items_sent_this_step = 0
            await self.wandb_log({})

    async def add_train_workers(self) -> None:
        """One round of admission: wait for leave to start groups, and start them."""
        await self._link.admit()

    def save_checkpoint(self, step: int, data: dict[str, Any] | None = None) -> None:
        """Save the environment's state beside the trainer's checkpoint. Override, and pass what you want to find again."""
        if data is not None:
            save_state(self._checkpoint_root, self.wandb_prepend or self.display_name, step, data)

    def load_checkpoint(self) -> None:
        """Set every key of the newest state, of the current step at most, as an attribute."""
        found = load_state(self._checkpoint_root, self.wandb_prepend or self.display_name, self.curr_step)
        if found is None:
            return
        step, data = found
        log.info("%s goes on from its checkpoint of step %d", self.display_name, step)
        for name, value in data.items():
            setattr(self, name, value)

    async def env_manager(self) -> None:
        """Collect for a trainer until the run is finished: what `serve` runs."""
        from atroposlib.envs.serving.serve import serve

        await serve(self)

    async def process_manager(self) -> None:
        """Write total_steps groups to the groups file, with no rollout server: what `process` runs."""
        from atroposlib.envs.processing.process import process

        await process(self, Path(self.config.data_path_to_save_groups or f"data/{self.name or 'groups'}.jsonl"))

    async def aclose(self) -> None:
        """Close servers, files and worker threads."""
        writer = self.__dict__.pop("jsonl_writer", None)
        if writer is not None:
            writer.close()
        self._blocking.close()
        await self.server.close()

    @classmethod
    def cli(cls) -> None:
        """Command line of the environment: serve, process, evaluate."""
        from atroposlib.envs.cli import main

        main(cls)

    @classmethod
    def get_cli_serve_config_cls(cls) -> type:
        """The command class of serve: a pydantic model with run(). Override to replace it."""
        return _command_class(cls, "serve")

    @classmethod
    def get_cli_process_config_cls(cls) -> type:
        """The command class of process."""
        return _command_class(cls, "process")

    @classmethod
    def get_cli_evaluate_config_cls(cls) -> type:
        """The command class of evaluate."""
        return _command_class(cls, "evaluate")

    # What the machinery uses

    @property
    def display_name(self) -> str:
        """wandb_name, else name, else the class name."""
        return self.config.wandb_name or self.name or type(self).__name__

    @property
    def derived_batch_size(self) -> int:
        """Sequences of a batch that this environment may fill; -1 when unknown."""
        return derived_batch_size(self.config.batch_size, self.status_dict, self.config.min_batch_allocation)

    @property
    def _model_name(self) -> str:
        """Of the policy, as the inference servers know it; all of them may have left."""
        servers = self.server.servers
        return servers[0].config.model_name if servers else "unknown"

    @property
    def _min_valid(self) -> int:
        return int(self.config.min_valid_per_group or self.config.group_size)

    @property
    def _checkpoint_root(self) -> Path:
        return Path(self.checkpoint_dir or self.config.run_dir or "")

    @property
    def _link(self) -> RunLink:
        if self.run_link is None:
            raise ConfigError(
                f"{type(self).__name__} is connected to no run; start it with `serve`, or await env.env_manager()"
            )
        return self.run_link


def _command_class(env_cls: type[BaseEnv], mode: str) -> type:
    from atroposlib.envs.command_line.commands import command_class

    return command_class(env_cls, mode)


__all__ = [
    "UUID",
    "APIServer",
    "APIServerConfig",
    "BaseEnv",
    "BaseEnvConfig",
    "EvalHandlingEnum",
    "Item",
    "Message",
    "OpenaiConfig",
    "ReasoningConfig",
    "ScoredDataGroup",
    "ScoredDataItem",
    "ServerBaseline",
    "ServerManager",
    "ServerManagerConfig",
]
