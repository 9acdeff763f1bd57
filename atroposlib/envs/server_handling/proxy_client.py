"""A managed session that lives in a proxy: the same calls as ManagedServer, over HTTP."""

from __future__ import annotations

import logging
import ssl
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from atroposlib.envs.server_handling.sessions.chat_messages import plain_messages
from atroposlib.envs.server_handling.sessions.provenance import Origin, remember
from atroposlib.envs.server_handling.sessions.sequence_node import SequenceNode
from atroposlib.errors import ConfigError, ModelServerError, RolloutError
from atroposlib.type_definitions import MASKED
from atroposlib.wire.layout import NOT_SAMPLED

if TYPE_CHECKING:
    import httpx
    from openai.types.chat import ChatCompletion

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 1200.0
CLEANUP_TIMEOUT_S = 5.0


class ProxyManagedServer:
    """One session of a proxy; leaving its context deletes it there.

    Args:
        proxy_url: where the proxy listens.
        session_uuid: of a session made with create_proxy_session.
        base_url: the inference server behind it, for readers.
        timeout_s: for one request, sampling included.
        require_version: refuse sampled tokens whose policy version the proxy does not say.
    """

    def __init__(
        self,
        proxy_url: str,
        session_uuid: str,
        model_name: str = "unknown",
        base_url: str | None = None,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        require_version: bool = False,
    ) -> None:
        self.proxy_url = proxy_url.rstrip("/")
        self.session_uuid = session_uuid
        self.model_name = model_name
        self.base_url = base_url
        self._timeout_s = timeout_s
        self._require_version = require_version
        self._nodes: list[SequenceNode] = []
        self._fetches = 0
        self._newest_fetch = 0
        self._http: httpx.AsyncClient | None = None

    def get_url(self) -> str:
        """The session as an OpenAI base URL, for agents of any kind."""
        return f"{self.proxy_url}/{self.session_uuid}/v1"

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """Chat; every option but `split` goes to the proxy. Afterwards get_state() holds the new nodes.

        Raises:
            ModelServerError: the proxy or the server behind it failed.
            RolloutError: the request was refused, or the session is gone.
        """
        from atroposlib.envs.server_handling.sessions.openai_answers import PlainChatCompletion

        body = {name: value for name, value in kwargs.items() if value is not None and name != "split"}
        body["messages"] = plain_messages(body.get("messages", ()))
        answer = await self._request("POST", "/v1/chat/completions", body)
        await self.fetch_state()
        return PlainChatCompletion.model_validate(answer)

    async def completion(self, **kwargs: Any) -> NoReturn:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the proxy has no route for text completions: use chat_completion")

    async def fetch_state(self) -> dict[str, Any]:
        """Ask the proxy for the nodes; needed only where an agent talked to get_url() by itself.

        Raises:
            ModelServerError: as chat_completion; or a sampled token lacks the policy version that is required.
        """
        self._fetches += 1
        fetch = self._fetches
        answer = await self._request("GET", "/nodes")
        # Answers of concurrent calls may cross: an older one must not take newer nodes away.
        if fetch > self._newest_fetch:
            self._newest_fetch = fetch
            self._take([SequenceNode.model_validate(node) for node in answer["nodes"]])
        return self.get_state()

    def _take(self, nodes: list[SequenceNode]) -> None:
        """Make these the session's nodes, and note where those that are new come from."""
        if self._require_version and any(_lacks_versions(node) for node in nodes):
            raise ModelServerError(
                f"the proxy {self.proxy_url} does not say which published policy version sampled its tokens, so "
                "they cannot be trained on; it can work once the trainer has published weights to its servers"
            )
        seen, self._nodes = self._nodes, nodes
        for node in nodes:
            if node in seen:
                # Once for each: another sequence of the same tokens has its own origin.
                seen.remove(node)
                continue
            versions = node.policy_versions or [(NOT_SAMPLED, len(node.tokens))]
            remember(node.tokens, Origin(node.logprobs, versions, (node.metadata or {}).get("finish_reason", "stop")))

    def get_state(self) -> dict[str, Any]:
        """The nodes as of the last call."""
        return {"nodes": list(self._nodes)}

    def reset(self) -> None:
        """Forget the nodes here; the proxy still has them."""
        self._nodes = []

    async def cleanup(self) -> None:
        """Delete the session in the proxy and close the connection. A proxy that is away forgets it by itself."""
        try:
            await self._request("DELETE", "", timeout_s=CLEANUP_TIMEOUT_S)
        except RolloutError as error:
            log.warning("session not deleted: %s", error)
        finally:
            if self._http is not None:
                await self._http.aclose()
                self._http = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cleanup()

    async def _request(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        if self._http is None:
            self._http = _new_client()
        url = f"{self.proxy_url}/{self.session_uuid}{path}"
        return await _ask(self._http, method, url, body, timeout_s=timeout_s or self._timeout_s)


async def create_proxy_session(
    proxy_url: str,
    base_url: str | None = None,
    tool_parser: str = "hermes",
    track_tree: bool = False,
    model_name: str = "unknown",
    *,
    timeout_s: float = REQUEST_TIMEOUT_S,
    require_version: bool = False,
) -> ProxyManagedServer:
    """Open a session in a proxy; use it as an async context manager, so that it is deleted.

    Args:
        base_url: of the inference server to use; None: the proxy chooses.
        model_name: where the proxy does not say.
        require_version: refuse sampled tokens whose policy version the proxy does not say.
    Raises:
        ModelServerError: the proxy is away.
        RolloutError: the proxy refused, for example because it does not know base_url.
    """
    body = {"tool_parser": tool_parser, "track_tree": track_tree, "base_url": base_url}
    async with _new_client() as http:
        url = f"{proxy_url.rstrip('/')}/sessions/create"
        answer = await _ask(http, "POST", url, body, timeout_s=timeout_s)
    return ProxyManagedServer(
        proxy_url,
        answer["uuid"],
        model_name=answer.get("model_name") or model_name,
        base_url=answer.get("base_url") or base_url,
        timeout_s=timeout_s,
        require_version=require_version,
    )


def _lacks_versions(node: SequenceNode) -> bool:
    """Whether some sampled token carries no policy version."""
    versions = [version for version, length in node.policy_versions for _ in range(length)]
    if not versions:
        return bool(node.completion_ids)
    return any(
        version == NOT_SAMPLED and label != MASKED for version, label in zip(versions, node.masked_tokens, strict=True)
    )


async def _ask(http: httpx.AsyncClient, method: str, url: str, body: Any, *, timeout_s: float) -> Any:
    import httpx

    try:
        response = await http.request(method, url, json=body, timeout=timeout_s)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(f"the proxy's address is not a URL: {url}: {error}") from error
    except httpx.TransportError as error:
        raise ModelServerError(f"the proxy did not answer {method} {url}: {type(error).__name__}: {error}") from error
    if response.status_code >= 500:
        raise ModelServerError(f"the proxy failed {method} {url} with {response.status_code}: {_message(response)}")
    if response.status_code >= 400:
        raise RolloutError(f"the proxy refused {method} {url} with {response.status_code}: {_message(response)}")
    return response.json()


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500]


def _new_client() -> httpx.AsyncClient:
    """A client of its own for each session: httpx slows down when one client has many requests in flight."""
    import httpx

    return httpx.AsyncClient(verify=_ssl_context())


@lru_cache(maxsize=1)
def _ssl_context() -> ssl.SSLContext:
    """Shared, for loading the certificates takes longer than a request."""
    return ssl.create_default_context()
