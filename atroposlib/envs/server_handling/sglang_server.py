"""An SGLang server: tokens in, tokens out over its native /generate route."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.server_handling.engines.native_server import NativeServer
from atroposlib.envs.server_handling.engines.prompt_logprobs import (
    prompt_logprobs_answer,
    sglang_positions,
    top_k_of,
)
from atroposlib.envs.server_handling.engines.prompts import take_prompt_ids
from atroposlib.envs.server_handling.engines.samples import (
    TokenCompletion,
    TokenSamples,
    finish_reason_name,
    version_number,
)
from atroposlib.envs.server_handling.openai_server import HEALTH_TIMEOUT_S
from atroposlib.errors import ModelServerError, PromptLogprobsError
from atroposlib.type_definitions import VersionRuns
from atroposlib.wire.layout import NOT_SAMPLED

GENERATE = "/generate"
VERSION_ROUTES = ("/model_info", "/get_model_info", "/get_weight_version")
"""Newest first; older servers have only the later ones."""

_RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
# Spelt out for the same reason as for vLLM: the trainer must know the distribution.
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class SGLangServer(NativeServer):
    """Rollouts over /generate, chat and completions over the OpenAI routes.

    SGLang names one weight version for a whole answer: the one at its end. Where tokens will be trained on, the version
    before the request is asked for as well, and the older of the two counts, so that staleness is never understated.
    """

    async def _reported_version(self) -> int | None:
        """NOT_SAMPLED: it says that nothing was published; None: it does not say."""
        for route in VERSION_ROUTES:
            answer = await self.http.get(f"{self.root_url}{route}", timeout_s=HEALTH_TIMEOUT_S)
            if answer.status in (401, 403, 404, 405):
                continue
            info = self.http.read(answer, route)
            if info.get("weight_version") is not None:
                return version_number(str(info["weight_version"]))
        return None

    async def _sample_tokens_wrapper(self, **kwargs: Any) -> TokenSamples:
        prompt_ids = take_prompt_ids(self, kwargs)
        before = await self._reported_version() if self.require_version else None
        sampling = sglang_sampling_params(kwargs)
        body = {"input_ids": prompt_ids, "sampling_params": sampling, "return_logprob": True}
        answers = await self._generate(body)
        try:
            completions = [self._completion(answer["meta_info"], before) for answer in answers]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelServerError(f"{self.http.server}: unreadable answer of {GENERATE}: {error!r}") from error
        if len(completions) != sampling["n"]:
            raise ModelServerError(f"{self.http.server} returned {len(completions)} completions for n={sampling['n']}")
        return TokenSamples(prompt_ids=prompt_ids, completions=completions)

    async def _get_logprobs_wrapper(self, **kwargs: Any) -> dict[str, Any]:
        prompt_ids = take_prompt_ids(self, kwargs)
        body = {
            "input_ids": prompt_ids,
            "sampling_params": {"max_new_tokens": kwargs.get("max_tokens") or 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top_k_of(kwargs),
        }
        [answer] = await self._generate(body)
        try:
            info = answer["meta_info"]
            positions = sglang_positions(info["input_token_logprobs"], info.get("input_top_logprobs"))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise PromptLogprobsError(
                f"{self.http.server} gave no prompt logprobs that can be read: {error!r}"
            ) from error
        return prompt_logprobs_answer(prompt_ids, positions, server=self.http.server)

    async def _generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        answer = await self.http.post(f"{self.root_url}{GENERATE}", {**body, "return_text_in_logprobs": False})
        fix = "is openai.server_type sglang right for this server, and openai.api_key?"
        content = self.http.read(answer, GENERATE, fix=fix)
        return content if isinstance(content, list) else [content]

    def _completion(self, info: dict[str, Any], before: int | None) -> TokenCompletion:
        finish_reason = finish_reason_name(info.get("finish_reason"))
        if finish_reason == "abort":
            raise ModelServerError(f"{self.http.server} aborted the request: {info.get('finish_reason')}")
        sampled = info["output_token_logprobs"]
        return TokenCompletion(
            token_ids=[int(token) for _, token, *_ in sampled],
            logprobs=[float(logprob) for logprob, *_ in sampled],
            finish_reason=finish_reason,
            versions=self._versions(info.get("weight_version"), before, len(sampled)),
        )

    def _versions(self, reported: Any, before: int | None, n_tokens: int) -> VersionRuns:
        oldest = NOT_SAMPLED
        if reported is not None and not (self.require_version and before is None):
            version = version_number(str(reported))
            oldest = version if before is None else min(version, before)
            self._check_published([oldest])
        return [(oldest, n_tokens)] if n_tokens else []


def sglang_sampling_params(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The engine's sampling parameters: other engines' spellings renamed, every default that matters spelt out."""
    given = {
        _RENAMED.get(name, name): value
        for name, value in kwargs.items()
        if value is not None and name not in ("model", "logprobs")
    }
    # vLLM's 0 for "all tokens".
    if given.get("top_k") == 0:
        given["top_k"] = -1
    return {**_SAMPLING_DEFAULTS, "n": 1, **given}
