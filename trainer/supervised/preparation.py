"""What a trainer on a data set starts from: model, tokenizer, and the rows as examples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import set_seed

from atroposlib.data.load import Splits, load_splits
from atroposlib.errors import ConfigError
from trainer.config import deepspeed_presets
from trainer.methods import check_required
from trainer.policy.loading import build_policy, load_policy, positions_of
from trainer.policy.logprobs import PackedPolicy
from trainer.policy.lora import options_of
from trainer.reporting.tracking import prepare_tracking
from trainer.supervised.config import DatasetTrainingConfig
from trainer.supervised.config_checks import EVAL_METRICS, GENERATION_METRICS
from trainer.supervised.evaluation import Question
from trainer.supervised.examples import Example, Row, is_prompt_alone, prepare, row_tokenizer
from trainer.supervised.tokenizers import load_tokenizer

log = logging.getLogger(__name__)

Rows = Sequence[Row]


@dataclass(frozen=True)
class Data:
    """The rows of a run as examples."""

    examples: list[Example]
    held_out: list[Example]
    """Those with a reply."""
    held_out_rows: Rows
    """All of them, for evaluations that sample."""
    facts: dict[str, float]
    """How many rows there were, and what became of them."""


def start(config: DatasetTrainingConfig) -> None:
    """What comes before anything is loaded: the sinks are checked, and ranks under DeepSpeed meet.

    Raises:
        ConfigError: a sink that report_to names cannot be used.
    """
    prepare_tracking(config)
    if config.deepspeed:
        deepspeed_presets.meet_ranks(on_cpu=config.use_cpu, timeout_s=config.ddp_timeout)


def policy_of(config: DatasetTrainingConfig, model: Any, tokenizer: Any) -> PackedPolicy:
    """The model to train: from memory, or the one that the configuration names. Lowers max_seq_length to its positions.

    Raises:
        ConfigError: there is none, its logprobs cannot be computed here, or it does not fit the tokenizer or max_seq_length.
    """
    # A fresh adapter is random.
    set_seed(config.seed)
    policy = _loaded(config, model)
    fit(config, policy, tokenizer)
    return policy


def _loaded(config: DatasetTrainingConfig, model: Any) -> PackedPolicy:
    if model is not None:
        return build_policy(model, logprob_chunk_size=config.logprob_chunk_size, lora=options_of(config))
    check_required(config, "model_name_or_path")
    return load_policy(
        config.model_name_or_path,
        torch_dtype=config.torch_dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        logprob_chunk_size=config.logprob_chunk_size,
        lora=options_of(config),
    )


def tokenizer_of(config: DatasetTrainingConfig, tokenizer: Any) -> Any:
    """The tokenizer of the rows: from memory, or the one that the configuration names.

    Raises:
        ConfigError: there is none.
    """
    if tokenizer is not None:
        return tokenizer
    check_required(config, "model_name_or_path")
    return load_tokenizer(
        config.tokenizer_name_or_path or config.model_name_or_path,
        key="tokenizer_name_or_path",
        trust_remote_code=config.trust_remote_code,
    )


def fit(
    config: DatasetTrainingConfig,
    policy: PackedPolicy,
    tokenizer: Any,
    *,
    whose: Literal["model", "teacher"] = "model",
) -> None:
    """See that a model goes with its tokenizer; lower max_seq_length to its positions, where it was not given.

    Raises:
        ConfigError: the tokenizer has ids without an embedding, or max_seq_length was given, and is more.
    """
    rows = int(policy.config.get_text_config().vocab_size)
    if len(tokenizer) > rows:
        key = "tokenizer_name_or_path" if whose == "model" else "teacher_tokenizer_name_or_path"
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and the {whose} embeddings for {rows}: give {key}=FOLDER of the "
            f"{whose}'s own"
        )
    positions = positions_of(policy.config.get_text_config())
    if positions is None or config.max_seq_length <= positions:
        return
    if config.is_given("max_seq_length"):
        raise ConfigError(
            f"max_seq_length={config.max_seq_length} is more than the {positions} positions of the {whose}: give "
            f"max_seq_length={positions} or less"
        )
    config.max_seq_length = positions


def data_of(
    config: DatasetTrainingConfig,
    tokenizer: Any,
    *,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | None = None,
    takes_prompts: bool = False,
) -> Data:
    """The rows as examples.

    Args:
        train_dataset, eval_dataset: rows, instead of those that config.data names.
        takes_prompts: keep rows that end before the reply.
    Raises:
        ConfigError: rows to evaluate on come without rows to train on.
        DataError: the rows cannot be read, or not one can be trained on.
    """
    if train_dataset is None and eval_dataset is not None:
        raise ConfigError(
            "eval_dataset goes with train_dataset: give both, or name the rows held out in the configuration "
            "(val_split, eval_split_ratio)"
        )
    if train_dataset is None:
        splits = splits_of(config)
    else:
        splits = Splits([dict(row) for row in train_dataset], [dict(row) for row in eval_dataset or ()], {})
    tokenize = row_tokenizer(
        tokenizer,
        completion_only=config.completion_only_training,
        last_turn_only=config.train_on_last_turn_only,
        response_marker=config.custom_start_of_response,
        takes_prompts=takes_prompts,
    )
    length = config.max_seq_length
    examples, counts = prepare(splits.train, tokenize, max_seq_length=length, takes_prompts=takes_prompts)
    held_out: list[Example] = []
    facts = counts.as_metrics("data")
    log.info("training rows: %s", counts)
    if config.evaluates:
        answered = [row for row in splits.eval if not is_prompt_alone(row)]
        held_out, eval_counts = prepare(answered, tokenize, max_seq_length=length)
        facts |= eval_counts.as_metrics("eval_data")
        log.info("rows held out: %s", eval_counts)
        _evaluate_if_held_out(config, splits.eval)
    return Data(
        examples, held_out, splits.eval, {f"data/{stage}": float(n) for stage, n in splits.funnel.items()} | facts
    )


def splits_of(config: DatasetTrainingConfig) -> Splits:
    """The rows that a configuration names, as conversations where it does not say otherwise."""
    data, changed = config.data, {}
    if data.form is None:
        changed["form"] = "conversation"
    if data.on_bad_line == "quarantine" and config.process_index != 0:
        # One rank writes the file for all.
        changed["on_bad_line"] = "skip"
    return load_splits(data.model_copy(update=changed))


def check_best(config: DatasetTrainingConfig, data: Data, questions: Sequence[Question] = ()) -> None:
    """What chooses the best checkpoint is measured. Where none is chosen, no figure has to be.

    Args:
        questions: what an evaluation samples answers to.
    Raises:
        ConfigError: an evaluation does not measure it; names what can be given instead.
    """
    metric, measured = str(config.metric_for_best_model), _measured(data, questions)
    if not config.evaluates or f"eval_{metric.removeprefix('eval_')}" in measured:
        return
    if not config.load_best_model_at_end:
        # transformers would look for it all the same.
        config.metric_for_best_model = None
        return
    lacking = "replies, and no row that is held out has one"
    if "success" in metric:
        lacking = "right answers, and no prompt that is held out has one (ground_truth, final_answer)"
    elif "tokens" in metric:
        lacking = "answers that are sampled, and no row that is held out asks for one"
    instead = f"metric_for_best_model={measured[0]}, or " if measured else ""
    raise ConfigError(
        f"metric_for_best_model={metric} is measured on {lacking}: give {instead}load_best_model_at_end=false"
    )


def _measured(data: Data, questions: Sequence[Question]) -> list[str]:
    has_truth = any(question.ground_truth is not None for question in questions)
    replies = EVAL_METRICS if data.held_out else ()
    sampled = GENERATION_METRICS if questions else ()
    return [*replies, *(name for name in sampled if has_truth or name != "eval_success_rate")]


def _evaluate_if_held_out(config: DatasetTrainingConfig, rows: Rows) -> None:
    """Turn evaluation off where no row is held out."""
    if not rows:
        log.warning(
            "no row is held out: there is no evaluation, and the final model is the last; give eval_dataset, or "
            "eval_split_ratio where rows come from dataset_path"
        )
        config.eval_strategy = "no"
        config.do_eval = config.load_best_model_at_end = config.eval_on_start = False
