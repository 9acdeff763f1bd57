"""Lets code written for AsyncOpenAI talk to a managed session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

_TRANSPORT_OPTIONS = ("extra_headers", "extra_query", "timeout", "model", "stream", "stream_options", "user")
"""What an OpenAI client says about the request, not about the sampling."""


class ManagedServerAdapter:
    """Looks like AsyncOpenAI: `.chat.completions.create(...)`, `.completions.create(...)`, `.base_url`.

    Args:
        managed_server: the session, whose nodes the requests fill.
        base_url: what readers of `.base_url` are told.
    """

    def __init__(self, managed_server: Any, base_url: str) -> None:
        self.managed_server = managed_server
        self.base_url = base_url
        self.chat = _Chat(managed_server)
        self.completions = _TextCompletions(managed_server)

    async def post(self, path: str, body: dict[str, Any], cast_to: type) -> NoReturn:
        """Not there: a session has no raw routes.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"a managed session has no raw routes, so not {path!r}; use chat.completions.create")

    def copy(self, **kwargs: Any) -> NoReturn:
        """Not there: a copy would be another session.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a managed session cannot be copied: open another one")


class _Chat:
    def __init__(self, managed_server: Any) -> None:
        self.completions = _ChatCompletions(managed_server)


class _ChatCompletions:
    def __init__(self, managed_server: Any) -> None:
        self._managed_server = managed_server

    async def create(self, **kwargs: Any) -> ChatCompletion:
        answer: ChatCompletion = await self._managed_server.chat_completion(**_request(kwargs))
        return answer


class _TextCompletions:
    def __init__(self, managed_server: Any) -> None:
        self._managed_server = managed_server

    async def create(self, **kwargs: Any) -> Completion:
        answer: Completion = await self._managed_server.completion(**_request(kwargs))
        return answer


def _request(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The request and its sampling options; the OpenAI package's marks for "not given" are left out."""
    if kwargs.get("stream") is True:
        raise NotImplementedError("a managed session answers whole: leave stream out")
    given = {**kwargs, **(kwargs.get("extra_body") or {})}
    return {
        name: value
        for name, value in given.items()
        if name not in (*_TRANSPORT_OPTIONS, "extra_body") and type(value).__name__ not in ("NotGiven", "Omit")
    }
