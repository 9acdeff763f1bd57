"""A pass that needs more memory than there is: an error that says what to make smaller."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trainer.config.deepspeed_presets import zero_stage
from trainer.errors import PassMemoryError

if TYPE_CHECKING:
    from trainer.config.shared import SharedOptions

MOST_REMEDIES = 3
# What allocators say that have no error type of their own.
_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Packed(Protocol):
    """Segments laid end to end for one forward and backward pass."""

    @property
    def input_ids_1T(self) -> Tensor:  # noqa: N802 (a tensor)
        """[1, T] token ids."""

    @property
    def segments_1T(self) -> Tensor:  # noqa: N802 (a tensor)
        """[1, T] which segment the token is in, counted from 0."""


@contextmanager
def within_memory(packed: Packed, config: SharedOptions) -> Iterator[None]:
    """Around one pass. The other ranks are not told: they wait for this one's gradients until its process has ended.

    Raises:
        PassMemoryError: it does not fit into memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        tokens = packed.input_ids_1T.numel()
        raise PassMemoryError(
            tokens,
            rank=config.process_index if config.world_size > 1 else None,
            peak=_peak(config.device),
            reason=str(error).splitlines()[0],
            remedies=remedies(config, tokens=tokens, is_one_sequence=not bool(packed.segments_1T.any())),
        ) from error


def remedies(config: SharedOptions, *, tokens: int, is_one_sequence: bool) -> list[str]:
    """What makes a pass of so many tokens smaller and is not used yet: three at most, what saves most first."""
    longest = "max_seq_length" if hasattr(config, "max_seq_length") else "max_token_len"
    stage, ranks = zero_stage(config.deepspeed), config.world_size
    # QLoRA's weights cannot be split.
    splits = ranks > 1 and stage < 3 and not getattr(config, "load_in_4bit", False)
    found = {
        f"max_tokens_per_micro_batch={tokens // 2}": not is_one_sequence,
        f"a {longest} below {tokens} (the pass is one sequence)": is_one_sequence,
        "gradient_checkpointing=true": not config.gradient_checkpointing,
        f"deepspeed=zero3 (weights, gradients and optimizer state split over {ranks} ranks)": splits,
        "use_peft=true (gradients and optimizer state of an adapter alone)": not config.use_peft,
        f"logprob_chunk_size={config.logprob_chunk_size // 2}": config.logprob_chunk_size > 1,
    }
    return [text for text, is_left in found.items() if is_left][:MOST_REMEDIES]


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{_gib(torch.cuda.max_memory_allocated(device))} allocated at the peak, of {_gib(total)}"
    # Linux counts in KiB.
    return f"{_gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} held by the process at the peak"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
