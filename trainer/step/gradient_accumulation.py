"""Forward and backward over the passes of one optimizer step; gradients are synchronised once, with the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from trainer.step.out_of_memory import Packed, within_memory

if TYPE_CHECKING:
    from trainer.config.shared import SharedOptions

P = TypeVar("P", bound=Packed)


class GradientAccumulation:
    """Adds up gradients. Every rank calls `run` with as many passes.

    Args:
        accelerator: of accelerate: knows how gradients are synchronised and how backward is called.
        config: of the run.
    """

    def __init__(self, accelerator: Any, config: SharedOptions, *, is_deepspeed: bool) -> None:
        self._accelerator = accelerator
        self._config = config
        self._is_deepspeed = is_deepspeed

    def run(self, model: Any, passes: Sequence[P], loss_of: Callable[[P], Tensor]) -> None:
        """Add up the gradients of one optimizer step.

        Args:
            model: in its wrappers.
            loss_of: the loss of a pass, as its share of the loss of all ranks' passes.
        Raises:
            PassMemoryError: a pass does not fit into memory.
        """
        last = len(passes) - 1
        for i, each in enumerate(passes):
            self._accelerator.gradient_state._set_sync_gradients(i == last)
            with within_memory(each, self._config), self._gradient_sync(model, is_last=i == last):
                # Ranks average their gradients; the loss is a share of a sum over all of them.
                self._backward(loss_of(each) * self._config.world_size)

    def _gradient_sync(self, model: Any, *, is_last: bool) -> AbstractContextManager[Any]:
        # DeepSpeed is told by the accumulation boundary, which accelerate sets from gradient_state.
        if is_last or self._is_deepspeed:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(model)
        return context

    def _backward(self, loss: Tensor) -> None:
        # scale_wrt_gas=False: DeepSpeed would divide by its own idea of accumulation.
        self._accelerator.backward(loss, **({"scale_wrt_gas": False} if self._is_deepspeed else {}))
