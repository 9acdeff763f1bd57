"""A vLLM server: tokens in, tokens out over its /inference/v1/generate route, with a policy version for every token."""

from __future__ import annotations

from typing import Any

import httpx

from atroposlib.envs.server_handling.openai_server import HEALTH_TIMEOUT_S, OpenAIServer
from atroposlib.envs.server_handling.samples import TokenCompletion, TokenSamples, version_number, version_runs
from atroposlib.errors import ConfigError, ModelServerError, RolloutError
from atroposlib.wire.layout import NOT_SAMPLED

GENERATE = "/inference/v1/generate"

_RENAMED = {"max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}
# Sent with every request: where they are absent the server takes the model's generation_config, and the trainer
# could not know what distribution the tokens came from.
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class VLLMServer(OpenAIServer):
    """Rollouts over the token route, chat and completions over the OpenAI ones.

    The server runs with ``--enable-scale-out --logprobs-mode processed_logprobs``.
    """

    async def check_health(self) -> None:
        """Alive, and for training also running published weights."""
        try:
            response = await self.http.get("/health", timeout=HEALTH_TIMEOUT_S)
            if response.status_code != 200:
                raise ModelServerError(
                    f"inference server {self.config.base_url}: GET /health answered {response.status_code}"
                )
            if self.require_version:
                info = await self.http.get("/weight_info", timeout=HEALTH_TIMEOUT_S)
                # Only servers in dev mode have the route; without it the first answer tells.
                if info.status_code == 200 and version_number(str(info.json()["weight_version"])) == NOT_SAMPLED:
                    raise self._unpublished()
        except httpx.HTTPError as error:
            raise self._error("health check", error) from error

    async def _sample_tokens_wrapper(self, **kwargs: Any) -> TokenSamples:
        input_ids, model = kwargs.pop("input_ids"), kwargs.pop("model")
        sampling = sampling_params(kwargs)
        body = {"token_ids": input_ids, "model": model, "sampling_params": sampling}
        try:
            response = await self.http.post(GENERATE, json=body)
        except httpx.HTTPError as error:
            raise self._error(GENERATE, error) from error
        if response.status_code in (403, 404):
            raise ConfigError(
                f"inference server {self.config.base_url} answered {response.status_code} on {GENERATE}: {response.text[:300]}; "
                f"start vLLM with --enable-scale-out, and serve the model under the name {model!r} (openai.model_name)"
            )
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise RolloutError(f"inference server {self.config.base_url} refused {sampling}: {response.text[:500]}")
        if response.status_code != 200:
            raise ModelServerError(
                f"inference server {self.config.base_url}: {GENERATE} answered {response.status_code}: {response.text[:300]}"
            )
        try:
            choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
            completions = [self._completion(choice) for choice in choices]
        except (ValueError, KeyError, TypeError) as error:
            raise self._error(f"unreadable answer of {GENERATE}", error) from error
        n = sampling["n"]
        if len(completions) != n:
            raise ModelServerError(
                f"inference server {self.config.base_url} returned {len(completions)} completions for n={n}"
            )
        return TokenSamples(prompt_ids=list(input_ids), completions=completions)

    def _completion(self, choice: dict[str, Any]) -> TokenCompletion:
        token_ids = choice["token_ids"]
        content = choice["logprobs"]["content"] or []
        if choice["finish_reason"] == "abort":
            raise ModelServerError(f"inference server {self.config.base_url} aborted the request")
        if [entry["token_id"] for entry in content] != token_ids:
            raise ModelServerError(
                f"inference server {self.config.base_url}: logprobs are not those of the sampled tokens"
            )
        versions = version_runs(
            choice.get("weight_versions"), len(token_ids), server=f"inference server {self.config.base_url}"
        )
        if self.require_version and any(version == NOT_SAMPLED for version, _ in versions):
            raise self._unpublished()
        return TokenCompletion(
            token_ids=token_ids,
            logprobs=[entry["logprob"] for entry in content],
            finish_reason=choice["finish_reason"],
            versions=versions,
        )

    def _unpublished(self) -> ModelServerError:
        return ModelServerError(
            f"inference server {self.config.base_url} does not run a published policy version, so its tokens cannot be trained on; "
            "it can work once the trainer has published weights to it"
        )


def sampling_params(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The engine's sampling parameters: upstream spellings renamed, every default that matters spelt out, logprobs asked for."""
    given = {_RENAMED.get(name, name): value for name, value in kwargs.items() if value is not None}
    return {**_SAMPLING_DEFAULTS, "n": 1, **given, "logprobs": 0}
