"""A checkpoint as a plain model folder, which transformers and vLLM load without knowing how it was trained.

    python -m trainer.export runs/demo/final exported --dtype bfloat16

Checkpoints are such folders already, in the precision of training. With an adapter they are peft folders: here it is merged.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atroposlib.errors import AtroposError, ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
ADAPTER_CONFIG = "adapter_config.json"


def export(checkpoint: Path, out: Path, *, dtype: str | None = None, base_model: str | None = None) -> Path:
    """Write a checkpoint as a whole model.

    Args:
        checkpoint: a folder that the trainer wrote: final, or checkpoint-N.
        out: a folder that does not exist yet. It is there whole, or not at all.
        dtype: of the weights; as they are if absent.
        base_model: what an adapter belongs to; the model that its folder names if absent.
    Returns:
        The folder.
    Raises:
        ConfigError: no such checkpoint, or `out` exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give a folder that does not, or remove it")
    lm = load_checkpoint(checkpoint, base_model=base_model)
    if dtype is not None:
        lm = lm.to(_dtype(dtype))
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        lm.save_pretrained(partial)
        _save_tokenizer(checkpoint, partial)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def load_checkpoint(checkpoint: Path, *, base_model: str | None = None) -> Any:
    """The model of a checkpoint, its adapter merged in, if it has one.

    Raises:
        ConfigError: the folder holds no model, or an adapter whose model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    adapter = _read_json(checkpoint / ADAPTER_CONFIG)
    if adapter is None:
        if not (checkpoint / "config.json").is_file():
            raise ConfigError(f"{checkpoint} holds no model; give RUN/final or RUN/checkpoints/checkpoint-N")
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    base = base_model or adapter.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{checkpoint} holds an adapter that does not say of which model; give --base-model")
    from peft import PeftModel

    try:
        lm = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot load {base}, the adapter's model: {first}; give --base-model FOLDER") from error
    return PeftModel.from_pretrained(lm, checkpoint).merge_and_unload()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export", description="Write a checkpoint as a whole model."
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/final or RUN/checkpoints/checkpoint-N")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; as they are by default")
    parser.add_argument("--base-model", help="of an adapter; the one that it names by default")
    options = parser.parse_args(arguments)
    try:
        print(export(options.checkpoint, options.out, dtype=options.dtype, base_model=options.base_model))
    except AtroposError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _save_tokenizer(source: Path, target: Path) -> None:
    if (source / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source).save_pretrained(target)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


if __name__ == "__main__":
    sys.exit(main())
