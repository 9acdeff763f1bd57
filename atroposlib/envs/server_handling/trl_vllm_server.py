"""TRL's `trl vllm-serve`: text and token ids over its /generate/ route."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from atroposlib.envs.server_handling.engines.prompts import served_tokenizer, take_prompt_ids
from atroposlib.envs.server_handling.engines.samples import TokenSamples, samples_from_lists
from atroposlib.envs.server_handling.openai_server import HEALTH_TIMEOUT_S, OpenAIServer
from atroposlib.errors import ModelServerError, RolloutError

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

GENERATE = "/generate/"

_RENAMED = {"max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}
_DEFAULTS = {
    "n": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": 1024,
}  # fmt: skip
_NO_LOGPROBS = (
    "this server's {route} gives no logprobs of token ids, so nothing can be trained on it: use a TRL whose vllm-serve "
    "takes token ids and returns logprobs, or --openai.server_type vllm with a vLLM server"
)


class TrlVllmServer(OpenAIServer):
    """Chat and completions render and decode here, with the model's tokenizer: the server knows only prompts and ids.

    Token ids with logprobs work where TRL's server returns logprobs. It reports no policy versions.
    """

    @cached_property
    def tokenizer(self) -> Any:
        """The served model's, loaded at first use."""
        return served_tokenizer(self.config)

    async def check_health(self) -> None:
        """Any answer below 500 to GET /health/."""
        answer = await self.http.get(f"{self.root_url}/health/", timeout_s=HEALTH_TIMEOUT_S)
        if answer.status >= 500:
            raise ModelServerError(f"inference server {self.api_url}: GET /health/ answered {answer.status}")

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        from openai.types.chat import ChatCompletion

        prompt = self.tokenizer.apply_chat_template(kwargs["messages"], tokenize=False, add_generation_prompt=True)
        choices = [
            {"index": i, "finish_reason": reason, "logprobs": None, "message": {"role": "assistant", "content": text}}
            for i, (text, reason) in enumerate(await self._texts(prompt, kwargs))
        ]
        return ChatCompletion.model_validate(self._answer("chat.completion", choices))

    async def _completion_wrapper(self, **kwargs: Any) -> Completion:
        from openai.types import Completion

        choices = [
            {"index": i, "finish_reason": reason, "logprobs": None, "text": text}
            for i, (text, reason) in enumerate(await self._texts(kwargs["prompt"], kwargs))
        ]
        return Completion.model_validate(self._answer("text_completion", choices))

    async def _sample_tokens_wrapper(self, **kwargs: Any) -> TokenSamples:
        prompt_ids = take_prompt_ids(self, kwargs)
        body = {**trl_body([prompt_ids], kwargs), "logprobs": 0}
        try:
            answer = await self._generate(body)
        except RolloutError as error:
            # Older servers take text only: they refuse the ids.
            if isinstance(error, ModelServerError):
                raise
            raise NotImplementedError(f"{_NO_LOGPROBS.format(route=GENERATE)}: {error}") from error
        if not answer.get("logprobs"):
            raise NotImplementedError(f"{self.http.server}: {_NO_LOGPROBS.format(route=GENERATE)}")
        outputs = answer["completion_ids"]
        logprobs = sampled_logprobs(outputs, answer["logprobs"], answer.get("logprob_token_ids"))
        return samples_from_lists(prompt_ids, outputs, logprobs, [self._finish_reason(ids) for ids in outputs])

    async def _texts(self, prompt: str, kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Completions as text, special tokens kept, each with its finish reason."""
        outputs = (await self._generate(trl_body([prompt], kwargs)))["completion_ids"]
        return [(self.tokenizer.decode(ids, skip_special_tokens=False), self._finish_reason(ids)) for ids in outputs]

    async def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.http.post(f"{self.root_url}{GENERATE}", body)
        content = self.http.read(answer, GENERATE, fix="is openai.server_type trl right for this server?")
        if not isinstance(content, dict) or not isinstance(content.get("completion_ids"), list):
            raise ModelServerError(f"{self.http.server}: unreadable answer of {GENERATE}: {answer.text}")
        return content

    def _finish_reason(self, token_ids: list[int]) -> str:
        return "stop" if self.tokenizer.eos_token_id in token_ids else "length"

    def _answer(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"trl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.config.model_name,
            "choices": choices,
        }


def trl_body(prompts: list[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The request: the parameters that the route names, the others in its generation_kwargs."""
    given = {_RENAMED.get(name, name): value for name, value in kwargs.items() if value is not None}
    named = {name: given.get(name, default) for name, default in _DEFAULTS.items()}
    outside = {"messages", "prompt", "model", "logprobs", "timeout", "extra_body", "extra_headers", *_DEFAULTS}
    others = {name: value for name, value in given.items() if name not in outside}
    return {"prompts": prompts, **named, **({"generation_kwargs": others} if others else {})}


def sampled_logprobs(
    outputs: list[list[int]], logprobs: list[list[Any]], candidate_ids: list[list[list[int]]] | None
) -> list[list[float]]:
    """Logprobs of the sampled tokens, from one number a token or from candidates with their ids beside them.

    Raises:
        ModelServerError: a token has no finite logprob.
    """
    found: list[list[float]] = []
    for i, ids in enumerate(outputs):
        row = []
        for j, token in enumerate(ids):
            entry = logprobs[i][j]
            if isinstance(entry, list):
                names = candidate_ids[i][j] if candidate_ids else [token]
                entry = entry[names.index(token)] if token in names else None
            if entry is None:
                raise ModelServerError(f"the server gave no logprob of token {token} at position {j}")
            row.append(float(entry))
        found.append(row)
    return found
