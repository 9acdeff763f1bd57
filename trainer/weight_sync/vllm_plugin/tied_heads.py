"""Let an output layer that shares its weights with the embedding follow them on a CPU."""

from __future__ import annotations

from typing import Any


def follow_embeddings() -> None:
    """Mend vLLM's reload of models with tied weights, once. For each process of vLLM.

    On a CPU the output layer computes with a packed copy of its weights. A reload packs anew only the layers that the
    checkpoint names, and a tied output layer is not among them: it would compute with the weights of the start for ever.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import layerwise

    finalize = layerwise.finalize_layerwise_processing
    if finalize.__name__ == "finalize_and_pack_heads":
        return

    def finalize_and_pack_heads(model: Any, model_config: Any) -> None:
        finalize(model, model_config)
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)

    layerwise.finalize_layerwise_processing = finalize_and_pack_heads
