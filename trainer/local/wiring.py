"""What follows from the trainer's options for the other parts of a local run. Decisions only; nothing is started."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.errors import ConfigError
from atroposlib.launch.inference import InferenceConfig
from atroposlib.launch.run_folder import RunFolder
from trainer.batches.resolver import check_groups
from trainer.config.grpo import GRPOConfig
from trainer.local.config import LocalConfig
from trainer.local.environment import FunctionEnvConfig
from trainer.weight_sync.connect import ADAPTER_NAME

DEFAULT_GROUP_SIZE = 8
DEFAULT_COMPLETION_TOKENS = 256
RUNS_DIR = Path("runs")
SHARED_GPU_UTILIZATION = 0.35
"""Share of a GPU's memory for the engine when the trainer is on it too."""


def wired(config: GRPOConfig) -> GRPOConfig:
    """The trainer's options with what local mode decides: a folder of its own, the size of groups, the way of weights.

    A run without run_dir and output_dir gets a fresh folder in runs/; with either of them it goes on where it stopped.

    Raises:
        ConfigError: several processes, or a batch that would split a group.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise ConfigError(
            f"local mode is one process, not {ranks}: write an environment, and start it and the trainer's ranks with "
            "atropos up (trainer_ranks)"
        )
    config = copy.copy(config)
    config.group_size = config.num_generations = config.group_size or DEFAULT_GROUP_SIZE
    check_groups(config.batch_size, config.group_size)
    config.max_completion_length = config.max_completion_length or DEFAULT_COMPLETION_TOKENS
    _place(config)
    if config.device.type == "cuda" and config.weight_sync.transport == "auto" and not config.sends_adapter:
        # The engine is on the trainer's GPU, where NCCL has no room for two.
        config.weight_sync = replace(config.weight_sync, transport="ipc")
    return config


def _place(config: GRPOConfig) -> None:
    """Decide on run_dir, output_dir and run_name."""
    default_dir = Path(next(field.default for field in fields(GRPOConfig) if field.name == "run_dir"))  # type: ignore[arg-type]
    if Path(config.run_dir) != default_dir:
        return
    if Path(str(config.output_dir)) != default_dir / "checkpoints":
        config.run_dir = str(config.output_dir)
    else:
        name = Path(config.model_name_or_path).name or "model"
        folder = RunFolder.create(RUNS_DIR, f"{name}-GRPO")
        config.run_dir, config.output_dir = str(folder.path), str(folder.checkpoints)
    if config.run_name == default_dir.name:
        config.run_name = Path(config.run_dir).resolve().name


def engine_config(
    config: GRPOConfig, local: LocalConfig, *, model: str, context_tokens: int | None
) -> InferenceConfig | None:
    """The inference server to start; None where the options name one that runs.

    Args:
        model: folder or Hub id that the engine loads, unless the options name another.
        context_tokens: longest sequence that the model was made for; None where it does not say.
    """
    if config.inference_servers or local.inference.base_url:
        return None
    section = local.inference
    model = section.model or model
    wanted = local.max_prompt_tokens + (config.max_completion_length or DEFAULT_COMPLETION_TOKENS)
    derived: dict[str, Any] = {
        "max_model_len": min(wanted, context_tokens or wanted),
        "is_offline": Path(model).is_dir(),
        **_sharing(config),
        **({"lora": True, "max_lora_rank": _lora_rank(config.lora_r)} if config.sends_adapter else {}),
    }
    given = {name: getattr(section, name) for name in section.model_fields_set}
    names = {"model": model, "served_model_name": served_model(config, local)}
    return section.model_copy(update={**derived, **given, **names})


def _sharing(config: GRPOConfig) -> dict[str, Any]:
    if config.device.type != "cuda":
        return {}
    backend = "ipc" if config.weight_sync.transport == "ipc" else "nccl"
    return {"weight_transfer": backend, "gpu_memory_utilization": SHARED_GPU_UTILIZATION}


def _lora_rank(rank: int) -> int:
    """The smallest rank that the engine can be started for."""
    ranks: tuple[int, ...] = get_args(InferenceConfig.model_fields["max_lora_rank"].annotation)
    return next((allowed for allowed in ranks if allowed >= rank), max(ranks))


def served_model(config: GRPOConfig, local: LocalConfig) -> str:
    """What the engine calls the model."""
    return local.inference.served_model_name or config.model_name_or_path


def server_configs(config: GRPOConfig, local: LocalConfig) -> list[APIServerConfig]:
    """How the environment reaches the engines of config.inference_servers."""
    name = ADAPTER_NAME if config.sends_adapter else served_model(config, local)
    return [
        APIServerConfig(
            base_url=f"{url}/v1", model_name=name, server_type="vllm", tokenizer_name=config.model_name_or_path
        )
        for url in config.inference_servers
    ]


def env_config(config: GRPOConfig, local: LocalConfig, *, evaluates: bool) -> FunctionEnvConfig:
    """Options of the environment."""
    group_size = config.group_size or DEFAULT_GROUP_SIZE
    return FunctionEnvConfig(
        group_size=group_size,
        # Twice what the engine decodes together, so that it never runs dry.
        max_num_workers=max(2, math.ceil(2 * local.inference.max_num_seqs / group_size)),
        max_token_length=local.max_prompt_tokens + (config.max_completion_length or DEFAULT_COMPLETION_TOKENS),
        total_steps=-1,
        steps_per_eval=local.eval_every_steps if evaluates else 0,
        rollout_server_url=config.rollout_server_url,
        tokenizer_name=None,
        seed=config.seed,
        ensure_scores_are_not_same=local.skip_equal_rewards,
        use_wandb=False,
        run_dir=Path(config.run_dir),
        # Reward functions are called one at a time: they need not be safe for threads.
        blocking_workers=1,
        max_tokens=config.max_completion_length or DEFAULT_COMPLETION_TOKENS,
        temperature=config.temperature,
        eval_temperature=local.eval_temperature,
        sampling=local.sampling,
        reward_timeout_s=local.reward_timeout_s,
    )
