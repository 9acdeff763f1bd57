"""The command line of an SGLang server."""

from __future__ import annotations

import sys

from atroposlib.launch.inference import InferenceConfig


def sglang_command(config: InferenceConfig, *, has_gpu: bool) -> tuple[list[str], dict[str, str]]:
    """Return the arguments that start the server, and what to add to its environment.

    Its weight routes are always there, whatever `weight_transfer` says, and its logprobs are those of the distribution
    that was sampled from.
    """
    argv = [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", config.model),
        *("--served-model-name", config.served_model_name or config.model),
        *("--host", config.host),
        *("--port", str(config.port)),
        *("--dtype", config.dtype),
        *("--context-length", str(config.max_model_len)),
        *("--max-running-requests", str(config.max_num_seqs)),
        *("--tensor-parallel-size", str(config.tensor_parallel_size)),
    ]
    if has_gpu:
        argv += ["--mem-fraction-static", str(config.gpu_memory_utilization)]
    else:
        argv += ["--device", "cpu"]
    if config.lora:
        # Without an adapter at the start it can tell neither rank nor modules by itself.
        argv += ["--enable-lora", "--max-lora-rank", str(config.max_lora_rank), "--lora-target-modules", "all"]
    env = {"HF_HUB_OFFLINE": "1"} if config.is_offline else {}
    return [*argv, *config.extra_args], env
