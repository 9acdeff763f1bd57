"""The vLLM worker's side of a weight transfer over gloo. vLLM loads it through `vllm_plugin.register`.

Buckets are staged in host memory and loaded together at the commit, so a trainer that dies half way leaves
the old weights whole. That costs one more copy of the weights in host memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from trainer.weight_sync.transports import gloo_group
from trainer.weight_sync.transports.buckets import TensorSpec, lay_out
from trainer.weight_sync.vllm_plugin.whole_model import load_whole_model


@dataclass
class GlooInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the trainer (rank 0) waits, and this server's place among the ranks."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float
    """Of the meeting."""


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket, or the order to load what has come (`commit`)."""

    sequence: int = 0
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    timeout_s: float = 0.0
    """For the bucket, from the moment that the trainer begins to send."""
    commit: bool = False


class GlooEngine(WeightTransferEngine):  # type: ignore[misc]
    """Receives buckets of weights from the trainer and loads them when all are there."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._meeting: gloo_group.Meeting | None = None
        self._rank_offset = 0
        self._staged: list[tuple[str, torch.Tensor]] = []
        self._buffers: list[torch.Tensor] = []
        """Host memory of one version, kept between updates: fresh memory costs more than filling it."""
        self._filled = 0

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group, leaving that of an earlier trainer."""
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._meeting = gloo_group.join(
            init_info.master_address,
            init_info.master_port,
            rank=rank,
            rank_offset=init_info.rank_offset,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )
        self._rank_offset = init_info.rank_offset

    def start_weight_update(self) -> None:
        """Begin with nothing staged. The model is touched at the commit, not before."""
        self._staged.clear()
        self._filled = 0

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take one bucket, or commit."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Stage one bucket; on `commit`, load all that is staged."""
        if update_info.commit:
            staged, self._staged = self._staged, []
            load_whole_model(self.model, self.model_config, staged)
            return
        if self._meeting is None:
            raise RuntimeError("this engine has met no trainer since it started: post /init_weight_transfer_engine")
        columns = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        bucket = lay_out([TensorSpec(name, dtype_name, tuple(shape)) for name, dtype_name, shape in columns])
        buffer = self._next_buffer(bucket.size_bytes)
        try:
            gloo_group.receive(
                self._meeting,
                buffer,
                sequence=update_info.sequence,
                rank_offset=self._rank_offset,
                timeout_s=update_info.timeout_s,
            )
        except BaseException:
            # What was given up may still arrive, some time: never in memory that is used again.
            self._forget()
            raise
        for slot in bucket.slots:
            dtype = getattr(torch, slot.spec.dtype_name)
            tensor = buffer[slot.offset_bytes : slot.end_bytes].view(dtype).view(slot.spec.shape)
            self._staged.append((slot.spec.name, tensor))

    def finish_weight_update(self) -> None:
        """End the update. Before a commit this abandons it: the old weights stay."""
        self._staged.clear()

    def shutdown(self) -> None:
        """Leave the trainer's group."""
        self._meeting = None
        self._forget()

    def _next_buffer(self, size_bytes: int) -> torch.Tensor:
        if self._filled == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[self._filled].numel() < size_bytes:
            self._buffers[self._filled] = torch.empty(size_bytes, dtype=torch.uint8)
        self._filled += 1
        return self._buffers[self._filled - 1][:size_bytes]

    def _forget(self) -> None:
        self._staged.clear()
        self._buffers.clear()
        self._filled = 0
