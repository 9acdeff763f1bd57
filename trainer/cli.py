"""The command `atropos-trainer`. Light to start: torch is imported when there is something to train."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from atroposlib.errors import AtroposError
from trainer.config import deepspeed_presets, presets
from trainer.config.resolved import describe, keep
from trainer.config.values import attribute_docs
from trainer.methods import METHODS, method_of
from trainer.weight_sync.config import WeightSyncConfig

if TYPE_CHECKING:
    from trainer.config.grpo import GRPOConfig
    from trainer.supervised.config import DatasetTrainingConfig

    AnyConfig = GRPOConfig | DatasetTrainingConfig

EXAMPLES = """\
examples:
  atropos-trainer --config trainer.yaml
  atropos-trainer --config trainer.yaml max_steps=50 learning_rate=1e-6
  atropos-trainer --config trainer.yaml weight_sync.transport=disk weight_sync.timeout_s=30
  atropos-trainer --config trainer.yaml recipe=dapo beta=0.001
  atropos-trainer recipe=sft_quickstart dataset_path=rows.jsonl
  atropos-trainer method=gkd model_name_or_path=STUDENT teacher_model_name_or_path=TEACHER dataset_path=rows.jsonl
  atropos-trainer model=smollm2_135m recipe=smoke_cpu rollout_server_url=http://127.0.0.1:8000
  atropos-trainer --config trainer.yaml use_peft=true lora_r=32 ~weight_decay
  atropos-trainer --config trainer.yaml 'run_dir=runs/${oc.env:USER,me}-${loss_type}' 'project=week-${now:%V}'
  atropos-trainer --config trainer.yaml --dry-run
  atropos-trainer --print-config model_name_or_path=models/SmolLM2-135M-Instruct
  torchrun --nproc_per_node 2 -m trainer.cli --config trainer.yaml deepspeed=zero2

Options win over each other in this order: defaults, presets, recipe, file, environment variables
(ATROPOS_TRAINER_WEIGHT_SYNC__TRANSPORT=disk is weight_sync.transport=disk), command line. --print-config shows the outcome.
A run that was stopped goes on from its last checkpoint when the same command is given again, so run_dir should not name
the time.
"""
_INDENT = " " * 6

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trainer; returns the exit status: 0 finished or stopped cleanly, 2 an error that the user can mend."""
    options = _parser().parse_intermixed_args(arguments)
    # Before torch and transformers are imported, which read them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # torch's store looks up the name of every peer; a name server that does not answer would hold up weight sync for its
    # usual 5 s a try. Three tries: one lost packet is no missing name.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # One line for each HTTP request drowns the one line for each step.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return _run(options)
    except AtroposError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atropos-trainer",
        description="Train a language model: with GRPO on the batches of a rollout server, or on a data set.",
        epilog=f"{_methods_help()}\n{_presets_help()}\n{_weight_sync_help()}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; groups of them may be nested")
    parser.add_argument("--recipe", metavar="NAME", help="same as recipe=NAME")
    parser.add_argument("--dry-run", action="store_true", help="check the configuration, print it and stop")
    parser.add_argument("--print-config", action="store_true", help="print every option with its origin and stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options that win over the file; ~key takes the default"
    )
    return parser


def _methods_help() -> str:
    lines = ["methods, chosen as method=NAME; each has options of its own:"]
    lines += [f"  {name}: {method.meaning}" for name, method in METHODS.items()]
    return "\n".join([*lines, ""])


def _presets_help() -> str:
    lines = ["presets, files of options that are chosen by name:"]
    lines += [f"  {group}= {', '.join(presets.names(group))}" for group in presets.GROUPS]
    return "\n".join([*lines, f"  deepspeed= {', '.join(deepspeed_presets.PRESETS)}, or a file", ""])


def _weight_sync_help() -> str:
    """Its options; --print-config shows all others too, which are too many for a help text."""
    docs = attribute_docs(WeightSyncConfig)
    lines = [
        "options of weight_sync, how new weights get into the inference servers (all others: --print-config, CONFIG.md):"
    ]
    for field in fields(WeightSyncConfig):
        text = f"{docs.get(field.name, '')} Default: {'none' if field.default is None else field.default}."
        lines += [
            f"  weight_sync.{field.name}",
            *textwrap.wrap(text, 100, initial_indent=_INDENT, subsequent_indent=_INDENT),
        ]
    return "\n".join([*lines, ""])


def _run(options: argparse.Namespace) -> int:
    from trainer.config.compose import load_config_with_origins

    _warn_of_variables()
    recipe = [f"recipe={options.recipe}"] if options.recipe else []
    config, origins = load_config_with_origins(options.config, [*recipe, *options.overrides])
    if options.dry_run or options.print_config:
        print(describe(config, origins))
        return 0
    if config.activate_debugging_logs:
        logging.getLogger("trainer").setLevel(logging.DEBUG)
    if config.process_index == 0:
        keep(config)
    return _train(config)


def _warn_of_variables() -> None:
    if "TRANSFORMERS_CACHE" in os.environ:
        log.warning("the environment variable TRANSFORMERS_CACHE is not read any more: set HF_HOME instead")


def _train(config: AnyConfig) -> int:
    from transformers.utils.logging import disable_progress_bar

    from trainer.step.allocator import GiveBackFreedMemory, keep_freed_memory

    disable_progress_bar()
    keeps_memory = config.use_cpu and keep_freed_memory()
    trainer = method_of(config).trainer_class(config)
    if keeps_memory:
        trainer.add_callback(GiveBackFreedMemory())

    def stop(number: int, _frame: object) -> None:
        trainer.request_stop(signal.Signals(number).name)
        # The second signal is for a trainer that does not come to an end.
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
