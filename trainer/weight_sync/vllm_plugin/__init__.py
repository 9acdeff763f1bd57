"""What runs inside the processes of vLLM: `register` adds our weight-transfer engines, and mends its reloads, in each of them."""

from __future__ import annotations

_ENGINES = {
    "gloo": ("trainer.weight_sync.vllm_plugin.gloo_engine", "GlooEngine"),
    "delta": ("trainer.weight_sync.vllm_plugin.delta_engine", "DeltaEngine"),
}


def register() -> None:
    """Register our engines, once. vLLM calls this in each of its processes, some of them twice."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from trainer.weight_sync.vllm_plugin.adapter_loading import load_adapters_once
    from trainer.weight_sync.vllm_plugin.tied_heads import follow_embeddings

    for name, (module, class_name) in _ENGINES.items():
        # vLLM refuses a name it already has and offers no public way to ask for one.
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, module, class_name)
    follow_embeddings()
    load_adapters_once()
