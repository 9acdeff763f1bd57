"""What a trainer holds in local mode: the user's functions and rows now, everything else while it trains."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError
from transformers import TrainerCallback

from atroposlib.envs.serving.serve import serve
from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.errors import ConfigError
from atroposlib.launch.run_folder import RunFolder
from trainer.config.grpo import GRPOConfig
from trainer.local.background import Background
from trainer.local.config import LocalConfig
from trainer.local.environment import FunctionEnv
from trainer.local.loop import LocalLoop
from trainer.local.progress import LiveLine
from trainer.local.rewards import RewardFunc, RewardFunctions
from trainer.local.rows import Row, Rows, check_rows, checked_row
from trainer.local.wiring import engine_config, env_config, server_configs, wired
from trainer.policy.loading import positions_of
from trainer.step.allocator import GiveBackFreedMemory, keep_freed_memory

log = logging.getLogger(__name__)

ENV_STOP_S = 20.0
"""For the environment to give back its tickets."""


class LocalTrainer(Protocol):
    """What is needed of the trainer."""

    args: GRPOConfig
    model: Any
    state: Any
    control: Any
    callback_handler: Any

    def request_stop(self, reason: str) -> None: ...  # noqa: D102
    def add_callback(self, callback: Any) -> None: ...  # noqa: D102
    def remove_callback(self, callback: Any) -> None: ...  # noqa: D102
    def log(self, logs: dict[str, float]) -> None: ...  # noqa: D102


class LocalMode:
    """Turns reward functions and rows into a run.

    Args:
        reward_funcs: one, or several; see RewardFunctions.
        train_dataset: rows with a prompt; all other columns are handed to the reward functions.
        eval_dataset: rows that are evaluated before and after training.
        reward_weights: of each function; 1 if absent.
        options: of local mode.
    Raises:
        ConfigError: something is missing or cannot be used.
    """

    def __init__(
        self,
        *,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None,
        train_dataset: Rows | None,
        eval_dataset: Rows | None = None,
        reward_weights: Sequence[float] | None = None,
        options: LocalConfig | Mapping[str, Any] | None = None,
    ) -> None:
        if reward_funcs is None or train_dataset is None:
            raise _incomplete(
                reward_funcs=reward_funcs,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                reward_weights=reward_weights,
                local=options,
            )
        self.options = _options(options)
        self.evaluations: dict[str, dict[str, Any]] = {}
        """Figures of eval_dataset by when: before, after."""
        self._rewards = RewardFunctions(reward_funcs, reward_weights)
        self._rows = train_dataset
        check_rows(train_dataset, "train_dataset")
        self._eval_rows = _eval_rows(eval_dataset)
        self._engine_model = ""
        self._tokenizer: Any = None

    @classmethod
    def wanted(cls, *, local: LocalConfig | Mapping[str, Any] | None, **arguments: Any) -> LocalMode | None:
        """Local mode, if any of its arguments is given."""
        if local is None and all(value is None for value in arguments.values()):
            return None
        return cls(options=local, **arguments)

    def configured(self, config: GRPOConfig, *, model: Any, tokenizer: Any) -> GRPOConfig:
        """The trainer's options for a local run; see wiring.wired.

        Args:
            model: in memory, or its name, or None for the configuration's.
            tokenizer: the policy's; None: that of the model's name.
        """
        config = wired(config)
        name = config.tokenizer_name_or_path or config.model_name_or_path
        # A copy: the trainer's own thread uses the other.
        self._tokenizer = copy.deepcopy(tokenizer) if tokenizer is not None else _tokenizer_of(name)
        self._engine_model = config.model_name_or_path
        if model is not None and not isinstance(model, str):
            folder = Path(config.run_dir) / "initial"
            model.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
            self._engine_model = str(folder)
        return config

    @contextmanager
    def around(self, trainer: LocalTrainer) -> Iterator[None]:
        """Start everything, evaluate, let the block train, evaluate again, and end everything.

        Raises:
            AtroposError: a service, the environment or a reward function failed; the block has ended before.
        """
        # Name servers that do not answer would hold up weight sync; see atropos-trainer.
        os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")
        with ExitStack() as stack:
            if trainer.args.use_cpu and keep_freed_memory():
                trainer.add_callback(gives_back := GiveBackFreedMemory())
                stack.callback(trainer.remove_callback, gives_back)
            line = stack.enter_context(LiveLine(trainer.args.max_steps, is_shown=self.options.show_progress))
            loop = stack.enter_context(self._loop(trainer, line))
            # Of servers that are gone, a second train() would start none.
            stack.callback(setattr, trainer.args, "inference_servers", trainer.args.inference_servers)
            self._connect(trainer.args, loop)
            is_new = not RunFolder(Path(trainer.args.run_dir)).has_evaluation("before")
            self._evaluate(trainer, line, loop, "before", is_wanted=self.options.eval_before and is_new)
            environment = self._environment_of(trainer)
            with_run = _WithTheRun(environment.start)
            for callback in (line, with_run):
                trainer.add_callback(callback)
                stack.callback(trainer.remove_callback, callback)
            line.say("waiting for the first batch")
            try:
                yield
            finally:
                if not environment.stop(ENV_STOP_S):
                    log.warning("the environment does not end within %.0f s; its thread is left", ENV_STOP_S)
            # A service first: its end is the cause of the environment's.
            for failure in (loop.failure, environment.failure):
                if failure is not None:
                    raise failure
            has_weights = loop.inference_up_since < with_run.stepped_at
            if not has_weights:
                log.warning(
                    "the inference server was started again after the last step, and has the weights of before: not "
                    "evaluated after training; the trained model is in %s",
                    RunFolder(Path(trainer.args.run_dir)).final,
                )
            self._evaluate(trainer, line, loop, "after", is_wanted=self.options.eval_after and has_weights)

    def _loop(self, trainer: LocalTrainer, line: LiveLine) -> LocalLoop:
        config = trainer.args
        context = positions_of(trainer.model.config.get_text_config())
        return LocalLoop(
            RunFolder(Path(config.run_dir)),
            engine_config(config, self.options, model=self._engine_model, context_tokens=context),
            ready_timeout_s=self.options.inference.ready_timeout_s,
            on_failure=partial(_stop, trainer, "the end of a service"),
            show_progress=line.say,
        )

    def _connect(self, config: GRPOConfig, loop: LocalLoop) -> None:
        """The ports are known only now."""
        config.rollout_server_url = loop.rollout_server_url
        url = self.options.inference.base_url
        own = [url.rstrip("/").removesuffix("/v1")] if url else loop.inference_servers
        config.inference_servers = own or config.inference_servers

    def _environment_of(self, trainer: LocalTrainer) -> Background:
        async def work() -> None:
            await serve(self._environment(trainer.args))

        return Background("local-environment", work, on_failure=partial(_stop, trainer, "the end of the environment"))

    def _environment(self, config: GRPOConfig, *, eval_folder: Path | None = None) -> FunctionEnv:
        options = env_config(config, self.options, evaluates=bool(self._eval_rows))
        if eval_folder is not None:
            options = options.model_copy(update={"data_dir_to_save_evals": str(eval_folder)})
        return FunctionEnv(
            options,
            server_configs(config, self.options),
            tokenizer=self._tokenizer,
            rows=self._rows,
            eval_rows=self._eval_rows,
            rewards=self._rewards,
        )

    def _evaluate(self, trainer: LocalTrainer, line: LiveLine, loop: LocalLoop, phase: str, *, is_wanted: bool) -> None:
        if not self._eval_rows or not is_wanted:
            return
        line.say(f"evaluating {phase}")

        async def work() -> None:
            folder = RunFolder(Path(trainer.args.run_dir)).evaluation(phase)
            environment = self._environment(trainer.args, eval_folder=folder)
            try:
                self.evaluations[phase] = await environment.evaluate()
            finally:
                await environment.aclose()

        background = Background("local-evaluation", work)
        background.start()
        try:
            while not background.join(1.0) and loop.failure is None:
                pass
        finally:
            background.stop(ENV_STOP_S)
        for failure in (loop.failure, background.failure):
            if failure is not None:
                raise failure
        reward = self.evaluations[phase].get("heldout_reward")
        if reward is not None:
            line.tell(f"held-out reward {phase}: {reward:.3f}")
            trainer.log({f"eval/reward_{phase}": reward})
        trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, self.evaluations[phase])


class _WithTheRun(TrainerCallback):  # type: ignore[misc]
    """Starts the environment when the trainer has opened its run: before, it might join one that is over."""

    def __init__(self, start: Callable[[], None]) -> None:
        self._start = start
        self.stepped_at = 0.0
        """Unix time; every engine that was up then has got the weights since."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The run is open, and the engines run its version."""
        self.stepped_at = time.time()
        self._start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The new weights are about to be published."""
        self.stepped_at = time.time()


def _incomplete(**arguments: Any) -> ConfigError:
    given = [name for name, value in arguments.items() if value is not None]
    missing = [name for name in ("reward_funcs", "train_dataset") if arguments[name] is None]
    return ConfigError(
        f"{' and '.join(given)} {'are' if len(given) > 1 else 'is'} for local mode, which also needs "
        f"{' and '.join(missing)}; leave all of them to train on the batches of a rollout server"
    )


def _options(given: LocalConfig | Mapping[str, Any] | None) -> LocalConfig:
    if isinstance(given, LocalConfig):
        return given
    try:
        return LocalConfig(**(given or {}))
    except ValidationError as error:
        told = "; ".join(
            f"local.{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        raise ConfigError(f"{told}; options of local mode: {', '.join(LocalConfig.model_fields)}") from error


def _eval_rows(rows: Rows | None) -> list[Row]:
    if rows is None:
        return []
    check_rows(rows, "eval_dataset")
    return [checked_row(row, number, "eval_dataset") for number, row in enumerate(rows)]


def _tokenizer_of(name: str) -> Any:
    try:
        return load_tokenizer(name)
    except ConfigError as error:
        raise ConfigError(f"there is no tokenizer for the model {name!r}; give processing_class=") from error


def _stop(trainer: LocalTrainer, reason: str, error: Exception) -> None:
    log.error("%s: %s", reason, error)
    trainer.request_stop(reason)
