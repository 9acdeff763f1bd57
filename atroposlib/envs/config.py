"""BaseEnvConfig: what every environment can be told."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from atroposlib.envs.eval_handling import EvalHandlingEnum

DEFAULT_WORKERS_PER_SERVER = 8


class BaseEnvConfig(BaseModel):
    """Settings common to all environments; subclass it for your own.

    The constructor ignores names that it does not know, as upstream environments rely on; YAML files warn of them, the
    command line refuses them.
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
    max_eval_workers: int = Field(
        default=16, description="Items that evaluate_items() evaluates at once; 0 or less: all."
    )
    max_token_length: int = Field(
        default=2048, ge=1, description="Tokens of the longest sequence this environment makes."
    )
    total_steps: int = Field(
        default=1000,
        ge=-1,
        description="serve: stop at this training step, -1: when the run ends. process: groups to make, -1: until the items run out.",
    )
    steps_per_eval: int = Field(
        default=100, description="Evaluate whenever training crosses a multiple of this step; 0 or less: never."
    )
    eval_handling: EvalHandlingEnum = Field(
        default=EvalHandlingEnum.STOP_TRAIN,
        description="While an evaluation runs: STOP_TRAIN starts no group, LIMIT_TRAIN keeps eval_limit_ratio of the "
        "workers, NONE changes nothing. Groups in flight always finish.",
    )
    eval_limit_ratio: float = Field(
        default=0.5, ge=0, le=1, description="LIMIT_TRAIN: share of the workers that goes on, rounded down."
    )
    eval_deadline_s: float = Field(
        default=14400.0, gt=0, description="Seconds an evaluation may take before it is given up."
    )
    rollout_server_url: str = Field(default="http://localhost:8000", description="Base URL of the rollout server.")
    servers_from_registry: bool = Field(
        default=False,
        description="Take the inference servers from the rollout server's registry; the configured one is the template.",
    )
    tokenizer_name: str | None = Field(
        default="NousResearch/DeepHermes-3-Llama-3-3B-Preview",
        description="Tokenizer of the model: a folder or a Hugging Face name; None: no tokenizer (evaluation over chat only).",
    )
    seed: int = Field(default=0, description="Seed of the environment's own randomness: order of items, splits.")
    inference_weight: float = Field(
        default=1.0,
        description="Share of the batch against other environments; 0 or less: only places that no other environment waits for.",
    )
    min_batch_allocation: float | None = Field(default=None, description="Smallest share of each batch, 0 to 1.")
    batch_size: int = Field(
        default=-1, ge=-1, description="Sequences of an optimizer step; the rollout server's value replaces it."
    )
    max_batches_offpolicy: int = Field(
        default=3,
        description="Where given: batches, queued and in flight, beyond which no group starts; 0 or less: no such bound. "
        "The trainer's max_staleness always holds.",
    )
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
    spool_dir: Path | None = Field(
        default=None,
        description="Folder for groups that the rollout server could not take yet; None: `spool` in run_dir, else data/spool.",
    )
    max_spool_bytes: int = Field(
        default=1 << 30, ge=0, description="Bytes of the spool; a group beyond them waits in memory. 0: no spool."
    )
    blocking_workers: int = Field(default=4, ge=1, description="Threads, and processes, of run_blocking().")
    include_messages: bool = Field(
        default=False, description="Fill `messages` with the decoded text where the environment gave none."
    )
    use_wandb: bool = Field(
        default=True, description="Log to Weights & Biases, where wandb is installed and the trainer names a project."
    )
    wandb_name: str | None = Field(
        default=None, description="Name of this environment in the run; None: the environment's own name."
    )
    num_rollouts_to_keep: int = Field(default=32, ge=0, description="Sample groups kept in memory for display.")
    num_rollouts_per_group_for_logging: int = Field(
        default=1, ge=-1, description="Sequences kept of each sample group; -1: all."
    )
    min_items_sent_before_logging: int = Field(
        default=2, ge=0, description="Groups accepted before the metrics of a step are logged."
    )
    data_path_to_save_groups: str | None = Field(
        default=None, description="JSONL file that gets every group; None: no file."
    )
    data_dir_to_save_evals: str | None = Field(
        default=None, description="Folder for metrics.json and samples.jsonl of an evaluation."
    )
    run_dir: Path | None = Field(
        default=None, description="Folder for ledger, sample rollouts and metrics; None: nothing is written."
    )

    thinking_mode: bool = Field(
        default=False, description="Ask the model to reason: adds `reasoning` to chat requests."
    )
    reasoning_effort: str | None = Field(
        default=None, description="none, minimal, low, medium, high or xhigh; turns reasoning on."
    )
    max_reasoning_tokens: int | None = Field(
        default=None, ge=1024, le=32000, description="Tokens of reasoning; turns reasoning on."
    )
    custom_thinking_prompt: str | None = Field(
        default=None, description="System prompt for reasoning; environments that know it read it here."
    )

    def resolve_group_deadline_s(self) -> float | None:
        """Seconds a group may take; None for no limit."""
        if self.group_deadline_s is not None:
            return self.group_deadline_s
        return self.worker_timeout if self.worker_timeout > 0 else None

    def resolve_spool_dir(self) -> Path:
        """Folder of the spool."""
        return self.spool_dir or (self.run_dir or Path("data")) / "spool"

    def resolve_max_num_workers(self, n_servers: int) -> int:
        """Groups in flight over all inference servers."""
        return self.max_num_workers if self.max_num_workers > 0 else self.max_num_workers_per_node * max(1, n_servers)
