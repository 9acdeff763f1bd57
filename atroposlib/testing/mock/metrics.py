"""The mock's load in Prometheus' text form, under vLLM's and SGLang's names."""

from __future__ import annotations

from collections.abc import Mapping

KV_TOKENS = 1_000_000
"""Tokens that the imaginary KV cache holds."""
_KV_TOKENS_PER_REQUEST = 1000


def metrics_text(model_name: str, *, running: int, waiting: int, totals: Mapping[str, int]) -> str:
    """The exposition.

    Args:
        running, waiting: generations that run, and that wait for a slot.
        totals: prompt_tokens, generation_tokens, finished/REASON.
    """
    usage = min(1.0, running * _KV_TOKENS_PER_REQUEST / KV_TOKENS)
    label = f'{{model_name="{model_name}"}}'
    gauges = {
        "vllm:num_requests_running": running,
        "vllm:num_requests_waiting": waiting,
        "vllm:kv_cache_usage_perc": usage,
        "sglang:num_running_reqs": running,
        "sglang:num_queue_reqs": waiting,
        "sglang:token_usage": usage,
    }
    counters = {
        "vllm:prompt_tokens_total": totals.get("prompt_tokens", 0),
        "vllm:generation_tokens_total": totals.get("generation_tokens", 0),
        "vllm:num_preemptions_total": 0,
    }
    lines = [line for name, value in gauges.items() for line in (f"# TYPE {name} gauge", f"{name}{label} {value}")]
    lines += [line for name, value in counters.items() for line in (f"# TYPE {name} counter", f"{name}{label} {value}")]
    lines.append("# TYPE vllm:request_success_total counter")
    for name, value in totals.items():
        if name.startswith("finished/"):
            reason = name.removeprefix("finished/")
            lines.append(f'vllm:request_success_total{{finished_reason="{reason}",model_name="{model_name}"}} {value}')
    return "\n".join(lines) + "\n"
