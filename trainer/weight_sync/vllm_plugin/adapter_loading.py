"""Let vLLM read an adapter when it is told to load it, and not again at every step."""

from __future__ import annotations

from typing import Any


def load_adapters_once() -> None:
    """Mend vLLM's in-place loading of adapters, once. For each process of vLLM.

    vLLM hands the wish to load in place on to every completion of the adapter, and its worker then loads the folder that
    the completion began with at each of its steps: 11 ms a token for 5 MB, an older adapter back in the newer one's place
    while a completion in flight began with that, and the engine's end when that folder is gone
    (https://github.com/vllm-project/vllm/issues/33791).
    """
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    apply_adapters = LRUCacheWorkerLoRAManager._apply_adapters
    if apply_adapters.__name__ == "apply_without_loading_in_place":
        return

    def apply_without_loading_in_place(self: Any, lora_requests: set[Any]) -> None:
        for request in lora_requests:
            request.load_inplace = False
        apply_adapters(self, lora_requests)

    LRUCacheWorkerLoRAManager._apply_adapters = apply_without_loading_in_place
