"""Every option of the GRPO trainer, parsed once and checked whole at start."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch

from atroposlib.errors import ConfigError
from atroposlib.wire.models import LatePolicy
from trainer.batches.advantages import AdvantageScale
from trainer.batches.step_batch import Overlong
from trainer.config import checks as config_checks
from trainer.config.shared import DEFAULT_BATCH_SIZE, SharedOptions, deepspeed_config, one_value
from trainer.losses.aggregation import LossAggregation
from trainer.losses.corrections import Correction
from trainer.losses.divergence import KlEstimator, KlPlacement
from trainer.losses.objectives import LOSS_TYPES, LossType
from trainer.policy import kernels, quantization
from trainer.weight_sync.config import WeightSyncConfig

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class GRPOConfig(SharedOptions):
    """Options of the GRPO trainer; those it inherits are those of transformers.TrainingArguments, less REFUSED."""

    WIDER_TYPES: ClassVar[dict[str, Any]] = {"loss_type": Literal.__getitem__((*LOSS_TYPES, "dr_grpo"))}
    """Options that take more than they hold once they are resolved."""

    model_name_or_path: str = ""
    """Folder or Hub id of the policy to train."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer that is saved beside the weights; the policy's own if absent. Nothing is tokenized here."""

    run_dir: str = "runs/atropos"
    """Metrics, ledger, checkpoints and the final model go here."""
    run_name: str | None = None
    """Who this run is to the rollout server: the same name goes on, another starts clean. The folder's name if absent."""

    rollout_server_url: str = "http://127.0.0.1:8000"
    """Base URL."""
    rollout_server_token: str | None = None
    """Bearer token of the role trainer; what ATROPOS_TOKEN holds if absent."""
    inference_servers: list[str] = field(default_factory=list)
    """Base URLs, without /v1, of the servers that get new weights. None: the version follows the step at once."""
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    """How new weights get into them."""

    batch_size: int = DEFAULT_BATCH_SIZE
    """Sequences (not groups) of one optimizer step, over all ranks. Also train_batch_size, and the product of
    per_device_train_batch_size, gradient_accumulation_steps and ranks; passes are cut by tokens all the same."""
    group_size: int | None = None
    """When given, environments must send groups of this size. Also num_generations."""
    num_generations: int | None = None
    """Another name of group_size."""
    max_token_len: int = -1
    """Tokens of the longest sequence that environments may send; -1 for no limit."""
    max_staleness: int = 4
    """Policy versions between sampling a token and training on it, at most."""
    late_policy: LatePolicy = "wait"
    """A group in flight that a batch cannot leave room for: wait for it; requeue its item; drop it. Only wait leaves the
    distribution of lengths as it was generated."""
    batch_deadline_s: float = 600.0
    """How long to wait for a batch before stopping with what the server waits for."""
    prefetch: int = 1
    """Batches leased ahead of the one in training."""

    temperature: float = 1.0
    """Sampling temperature of groups that do not say theirs."""
    advantage_scale: AdvantageScale = "none"
    """none: r - mean of the group. group_std, batch_std: divided by that. loo: r - mean of the others."""
    loss_type: LossType = "ppo_clip"
    """ppo_clip: clipped ratio to the policy at the step's start. reinforce: no clip. cispo: capped ratio as a weight. gspo: one
    ratio for the whole sequence. dppo: no token whose probability has moved too far. dr_grpo: ppo_clip with
    advantage_scale=none and loss_aggregation=constant."""
    epsilon_low: float = 0.2
    """ppo_clip, gspo: how far the ratio may fall below 1. gspo wants about 3e-4: see recipe=gspo."""
    epsilon_high: float = 0.28
    """ppo_clip, gspo: how far it may rise above 1. gspo wants about 4e-4."""
    dual_clip_c: float | None = None
    """ppo_clip: bound on the loss of an unlikely token with a negative advantage, e.g. 3."""
    cispo_cap: float = 5.0
    """cispo: largest weight of a token."""
    dppo_low: float = 0.2
    """dppo: a token with a negative advantage is left out once its probability has fallen by more than this."""
    dppo_high: float = 0.2
    """dppo: a token with a positive advantage is left out once its probability has risen by more than this."""
    loss_aggregation: LossAggregation = "token_mean"
    """What is averaged, over the whole batch: tokens; sequences; tokens of each prompt's group; or a constant divisor."""
    max_completion_length: int | None = None
    """Tokens of the longest completion: what loss_aggregation=constant divides by and where overlong=soft ends, which need
    it; and what local mode samples at most."""
    correction: Correction = "tis"
    """By trainer's over engine's probability. tis: weigh tokens by it, up to is_cap. mis: leave out tokens where it is outside
    mis_low and mis_high. seq_tis, seq_mis: the same by whole sequences. bypass: measure loss_type's ratio from the engine
    instead. none: as if both agreed."""
    is_cap: float = 2.0
    """tis, seq_tis: largest weight."""
    mis_low: float = 0.5
    """mis, seq_mis: a smaller ratio gets the weight 0."""
    mis_high: float = 5.0
    """mis, seq_mis: a larger ratio gets the weight 0."""
    overlong: Overlong = "mask"
    """Sequences cut by a length limit. mask: no loss. keep: train them like the others. soft: keep them, and take up to 1 off
    the reward of every sequence for the last overlong_cache tokens below max_completion_length."""
    overlong_cache: int | None = None
    """overlong=soft: tokens below max_completion_length over which the reward falls by 1."""
    unbias_log_probabilities: bool = True
    """Divide logits by the temperature that each sequence was sampled at. False: logprobs at temperature 1."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy of the policy, which is made larger; nats."""

    num_minibatches: int = 1
    """Optimizer steps that a batch is cut into, by whole sequences."""
    ppo_epochs: int = 1
    """Times that a batch is gone through."""

    beta: float = 0.0
    """Weight of the divergence from the reference policy. 0: no reference is loaded."""
    kl_estimator: KlEstimator = "k2"
    """With d = lp - lp_ref: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d."""
    kl_placement: KlPlacement = "loss"
    """loss: a term of the loss. reward: taken off the advantage of each token."""
    ref_model_name_or_path: str | None = None
    """The reference policy; the policy's own first weights if absent."""
    sync_ref_model: bool = False
    """Move the reference towards the policy every ref_model_sync_steps."""
    ref_model_mixup_alpha: float = 0.9
    """sync_ref_model: reference = alpha * policy + (1 - alpha) * reference."""
    ref_model_sync_steps: int = 64
    """sync_ref_model: steps between two moves."""
    offload_untrained_models: bool = False
    """Keep the reference's weights in host memory between its uses."""

    distill_coef: float = 0.0
    """Weight of the divergence from the teacher whose top tokens a group brings along."""
    distill_beta: float = 0.5
    """gkd_mode=jsd: 0 is KL(teacher || policy), 1 is KL(policy || teacher), between them the mixture of both."""
    gkd_mode: Literal["jsd", "policy_gradient"] = "jsd"
    """jsd: divergence over the teacher's top tokens. policy_gradient: the sampled token's log-ratio as an advantage."""

    pack: bool = True
    """Lay sequences end to end in one pass. False: one sequence a pass, for comparisons."""
    max_tokens_per_micro_batch: int = 4096
    """Tokens of one forward and backward pass; a longer sequence gets a pass of its own."""

    use_peft: bool = False
    """Train a LoRA adapter instead of all weights. Checkpoints then hold the adapter. Engines get the adapter
    (weight_sync.transport auto or lora) or the weights with the adapter merged in (any other)."""
    lora_r: int = 16
    """use_peft: rank of the adapter; the engine's --max-lora-rank must not be below."""
    lora_dropout: float = 0.0
    """use_peft: above 0, the policy that is trained is not quite the one that was sampled."""
    load_in_4bit: bool = False
    """use_peft: hold the weights under the adapter in 4 bits (QLoRA; needs bitsandbytes). Engines keep theirs: they get the adapter."""
    use_liger_kernel: bool = False
    """Fused kernels of liger_kernel for norms, rotary embeddings and MLPs, on CUDA. Not for the output layer: see
    logprob_chunk_size."""
    liger_kernel_config: dict[str, bool] | None = None
    """use_liger_kernel: which kernels, e.g. {rope: false}; all that the model's type has if absent."""

    log_completions: bool = False
    """Write a sample of decoded completions to completions.jsonl, and to wandb where report_to names it."""
    save_completions_probability: float | None = None
    """Chance of each completion to be written to completions.jsonl; 8 a step if absent and log_completions is on."""

    max_steps: int = 200
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: float = 10

    def __post_init__(self) -> None:
        self._resolve_names()
        self._resolve_batch(group_size=self.group_size)
        config_checks.check(self)
        self._resolve_places()
        if self.deepspeed:
            self.deepspeed = deepspeed_config(self.deepspeed, self.max_grad_norm)
        self.disable_tqdm = True
        self._leave_data_to_us()
        self._choose_device()
        quantization.check(self)
        kernels.check(self, has_cuda=torch.cuda.is_available())
        super().__post_init__()
        config_checks.check_deadlines(self)
        for doubt in config_checks.doubts(self):
            log.warning("%s", doubt)

    @property
    def sends_adapter(self) -> bool:
        """Whether engines get the adapter alone, not whole weights."""
        return self.use_peft and self.weight_sync.transport in ("auto", "lora")

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for the sinks of report_to."""
        return {**super().to_dict(), "weight_sync": asdict(self.weight_sync)}

    def _resolve_names(self) -> None:
        """Options that stand for others."""
        self.group_size = one_value("group_size", self.group_size, "num_generations", self.num_generations)
        self.num_generations = self.group_size
        self._resolve_model_init()
        if str(self.loss_type) == "dr_grpo":
            self._resolve_dr_grpo()
        self._resolve_sinks()

    def _resolve_dr_grpo(self) -> None:
        if self.advantage_scale != "none" or self.loss_aggregation not in ("token_mean", "constant"):
            raise ConfigError(
                f"loss_type=dr_grpo means advantage_scale=none and loss_aggregation=constant, not {self.advantage_scale} "
                f"and {self.loss_aggregation}: leave both, or give loss_type=ppo_clip"
            )
        self.loss_type, self.loss_aggregation = "ppo_clip", "constant"
