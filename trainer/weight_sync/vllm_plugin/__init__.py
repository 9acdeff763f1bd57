"""What runs inside the processes of vLLM: `register` adds our weight-transfer engines to each of them."""

from __future__ import annotations


def register() -> None:
    """Register engine `gloo`, once. vLLM calls this in each of its processes, some of them twice."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    # vLLM refuses a name it already has and offers no public way to ask for one.
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", "trainer.weight_sync.vllm_plugin.gloo_engine", "GlooEngine")
