"""BaseEnvConfig: what every environment can be told."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_WORKERS_PER_SERVER = 8


class BaseEnvConfig(BaseModel):
    """Settings common to all environments; subclass it for your own.

    The constructor ignores names that it does not know, as upstream environments rely on; the command line and YAML
    files refuse them.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    group_size: int = Field(default=4, ge=1, description="Sequences per group, scored against each other.")
    max_num_workers: int = Field(
        default=-1,
        ge=-1,
        description="Groups in flight at once; -1: max_num_workers_per_node for each inference server.",
    )
    max_num_workers_per_node: int = Field(
        default=DEFAULT_WORKERS_PER_SERVER, ge=1, description="Groups in flight for each inference server."
    )
    max_token_length: int = Field(
        default=2048, ge=1, description="Tokens of the longest sequence this environment makes."
    )
    total_steps: int = Field(
        default=1000,
        ge=-1,
        description="serve: stop at this training step, -1: when the run ends. process: groups to make.",
    )
    steps_per_eval: int = Field(
        default=100, description="Evaluate whenever training crosses a multiple of this step; 0 or less: never."
    )
    rollout_server_url: str = Field(default="http://localhost:8000", description="Base URL of the rollout server.")
    tokenizer_name: str | None = Field(
        default="NousResearch/DeepHermes-3-Llama-3-3B-Preview",
        description="Tokenizer of the model: a folder or a Hugging Face name; None: no tokenizer (evaluation over chat only).",
    )
    seed: int = Field(default=0, description="Seed of the environment's own randomness: order of items, splits.")
    inference_weight: float = Field(default=1.0, description="Share of the batch against other environments.")
    min_batch_allocation: float | None = Field(default=None, description="Smallest share of each batch, 0 to 1.")
    ensure_scores_are_not_same: bool = Field(
        default=True, description="Drop groups whose scores are all equal: they teach nothing."
    )
    min_valid_per_group: int | None = Field(
        default=None,
        ge=1,
        description="Send a group with this many sequences when others failed for infrastructure reasons; None: all must succeed.",
    )
    group_deadline_s: float | None = Field(
        default=None, gt=0, description="Seconds a group may take before it is given up; None: worker_timeout."
    )
    worker_timeout: float = Field(
        default=600.0, description="Upstream name of group_deadline_s; 0 or less: no deadline."
    )
    server_deadline_s: float = Field(
        default=1800.0,
        gt=0,
        description="Seconds without the rollout server, or without a trainer's run on it, before giving up.",
    )
    include_messages: bool = Field(
        default=False, description="Fill `messages` with the decoded text where the environment gave none."
    )
    use_wandb: bool = Field(default=False, description="Log to Weights & Biases.")
    wandb_name: str | None = Field(
        default=None, description="Name of this environment in the run; None: the environment's own name."
    )
    num_rollouts_to_keep: int = Field(default=32, ge=0, description="Sample rollouts kept in memory for display.")
    data_path_to_save_groups: str | None = Field(
        default=None, description="JSONL file that gets every group; None: no file."
    )
    data_dir_to_save_evals: str | None = Field(
        default=None, description="Folder for metrics.json and samples.jsonl of an evaluation."
    )
    run_dir: Path | None = Field(
        default=None, description="Folder for ledger, sample rollouts and metrics; None: nothing is written."
    )

    def resolve_group_deadline_s(self) -> float | None:
        """Seconds a group may take; None for no limit."""
        if self.group_deadline_s is not None:
            return self.group_deadline_s
        return self.worker_timeout if self.worker_timeout > 0 else None

    def resolve_max_num_workers(self, n_servers: int) -> int:
        """Groups in flight over all inference servers."""
        return self.max_num_workers if self.max_num_workers > 0 else self.max_num_workers_per_node * max(1, n_servers)
