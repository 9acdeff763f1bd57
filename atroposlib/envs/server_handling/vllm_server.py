"""A vLLM server: tokens in, tokens out over its /inference/v1/generate route, with a policy version for every token."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.server_handling.engines.http_client import HttpAnswer
from atroposlib.envs.server_handling.engines.native_server import NativeServer
from atroposlib.envs.server_handling.engines.prompt_logprobs import prompt_logprobs_answer, top_k_of, vllm_positions
from atroposlib.envs.server_handling.engines.prompts import take_prompt_ids
from atroposlib.envs.server_handling.engines.samples import TokenCompletion, TokenSamples, version_number, version_runs
from atroposlib.envs.server_handling.engines.vllm_bundled import BUNDLED_GENERATE, bundled_body, bundled_samples
from atroposlib.envs.server_handling.openai_server import HEALTH_TIMEOUT_S
from atroposlib.errors import ModelServerError, PromptLogprobsError
from atroposlib.wire.layout import NOT_SAMPLED

GENERATE = "/inference/v1/generate"
COMPLETIONS = "/v1/completions"

_RENAMED = {"max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}
# Sent with every request: where they are absent the server takes the model's generation_config, and the trainer
# could not know what distribution the tokens came from.
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class VLLMServer(NativeServer):
    """Rollouts over the token route, chat and completions over the OpenAI ones.

    The server runs with ``--enable-scale-out --logprobs-mode processed_logprobs``. The server that upstream's trainer
    bundled is recognised by what it lacks, and spoken to in its own way; it reports no policy versions.
    """

    _token_wire: str | None = None
    """The route that answered; None before the first answer."""
    _logprob_wire: str | None = None
    _last_version = NOT_SAMPLED
    """The policy version that its latest tokens came from."""

    async def _reported_version(self) -> int | None:
        """NOT_SAMPLED: it says that nothing was published; None: it does not say."""
        answer = await self.http.get(f"{self.root_url}/weight_info", timeout_s=HEALTH_TIMEOUT_S)
        if answer.status in (401, 403, 404, 405):
            return None
        info = self.http.read(answer, "/weight_info")
        return version_number(str(info.get("weight_version")))

    async def _sample_tokens_wrapper(self, **kwargs: Any) -> TokenSamples:
        prompt_ids, model = take_prompt_ids(self, kwargs), kwargs.pop("model")
        sampling = sampling_params(kwargs)
        body = {"token_ids": prompt_ids, "model": model, "sampling_params": sampling, **self._cache_salt()}
        wire, answer = await self._post_first(
            self._token_wire, [(GENERATE, body), (BUNDLED_GENERATE, bundled_body(prompt_ids, sampling))]
        )
        content = self._read(answer, wire)
        self._token_wire = wire
        try:
            if wire == GENERATE:
                samples = self._samples(prompt_ids, content)
            else:
                samples = bundled_samples(prompt_ids, content, server=self.http.server)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelServerError(f"{self.http.server}: unreadable answer of {wire}: {error!r}") from error
        if len(samples.completions) != sampling["n"]:
            raise ModelServerError(
                f"{self.http.server} returned {len(samples.completions)} completions for n={sampling['n']}"
            )
        return samples

    def _cache_salt(self) -> dict[str, str]:
        """Keys and values of a prompt that another policy computed are not those of this one.

        They are not shared from the first answer of a policy on: only an answer says which policy the server runs.
        """
        return {} if self._last_version == NOT_SAMPLED else {"cache_salt": f"policy-{self._last_version}"}

    async def _get_logprobs_wrapper(self, **kwargs: Any) -> dict[str, Any]:
        prompt_ids, model = take_prompt_ids(self, kwargs), kwargs.pop("model")
        given = {_RENAMED.get(name, name): value for name, value in kwargs.items()}
        asked = {"prompt_logprobs": top_k_of(kwargs), "n": 1, "temperature": 0.0, "top_p": 1.0}
        asked["max_tokens"] = given.get("max_tokens") or 1
        wire, answer = await self._post_first(
            self._logprob_wire,
            [
                (GENERATE, {"token_ids": prompt_ids, "model": model, "sampling_params": asked}),
                (BUNDLED_GENERATE, bundled_body(prompt_ids, asked)),
                (COMPLETIONS, {"prompt": prompt_ids, "model": model, **asked}),
            ],
        )
        content = self._read(answer, wire)
        holder = content["choices"][0] if wire == COMPLETIONS else content
        if holder.get("prompt_logprobs") is None:
            raise PromptLogprobsError(f"{self.http.server} answered {wire} without prompt_logprobs")
        self._logprob_wire = wire
        positions = vllm_positions(holder["prompt_logprobs"], len(prompt_ids), server=self.http.server)
        return prompt_logprobs_answer(prompt_ids, positions, server=self.http.server)

    async def _post_first(self, known: str | None, routes: list[tuple[str, dict[str, Any]]]) -> tuple[str, HttpAnswer]:
        """The answer of the first route that is there, beginning with the one that answered before."""
        answers = []
        for route, body in sorted(routes, key=lambda entry: entry[0] != known):
            answer = await self.http.post(f"{self.root_url}{route}", body)
            if answer.status not in (404, 405):
                return route, answer
            answers.append((route, answer))
        # The error is about the route that a server ought to have.
        return min(answers, key=lambda entry: entry[0] != GENERATE)

    def _read(self, answer: HttpAnswer, route: str) -> Any:
        fix = (
            "start vLLM with --enable-scale-out, "
            f"and serve the model under the name {self.config.model_name!r} (openai.model_name)"
        )
        return self.http.read(answer, route, fix=fix)

    def _samples(self, prompt_ids: list[int], content: Any) -> TokenSamples:
        choices = sorted(content["choices"], key=lambda choice: choice["index"])
        return TokenSamples(prompt_ids=prompt_ids, completions=[self._completion(choice) for choice in choices])

    def _completion(self, choice: dict[str, Any]) -> TokenCompletion:
        token_ids = choice["token_ids"]
        content = choice["logprobs"]["content"] or []
        if choice["finish_reason"] == "abort":
            raise ModelServerError(f"{self.http.server} aborted the request")
        if [entry["token_id"] for entry in content] != token_ids:
            raise ModelServerError(f"{self.http.server}: logprobs are not those of the sampled tokens")
        spans = choice.get("weight_versions")
        versions = version_runs(spans, len(token_ids), server=self.http.server)
        # An engine that says nothing at all is left to the caller, who can ask it for its version.
        if spans:
            self._check_published([version for version, _ in versions])
        if versions:
            self._last_version = versions[-1][0]
        return TokenCompletion(
            token_ids=token_ids,
            logprobs=[entry["logprob"] for entry in content],
            finish_reason=choice["finish_reason"],
            versions=versions,
        )


def sampling_params(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The engine's sampling parameters: upstream spellings renamed, every default that matters spelt out, logprobs asked for."""
    given = {_RENAMED.get(name, name): value for name, value in kwargs.items() if value is not None}
    return {**_SAMPLING_DEFAULTS, "n": 1, **given, "logprobs": 0}
