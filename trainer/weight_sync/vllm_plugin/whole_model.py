"""Load a whole version into a running model: layers repacked as at the start, or left as they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info


def load_whole_model(model: Any, model_config: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load tensors of Hugging Face names. On an error layers that were complete are new and the others old."""
    initialize_layerwise_reload(model)
    try:
        model.load_weights(iter(tensors))
    except BaseException:
        _forget_unfinished_layers(model)
        raise
    finally:
        finalize_layerwise_reload(model, model_config)


def _forget_unfinished_layers(model: Any) -> None:
    """Let `finalize` put the old tensors back where a layer has only some of its new ones."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
