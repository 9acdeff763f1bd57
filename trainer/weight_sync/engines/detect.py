"""Who is behind a URL: vLLM or SGLang. A server that does not answer yet is asked again when it is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from trainer.weight_sync.engines.control import EngineControl, EngineName, PauseMode
from trainer.weight_sync.engines.http import EngineHttp
from trainer.weight_sync.engines.sglang import SglangControl
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import Edge, time_left

_ROUTES: tuple[tuple[str, EngineName], ...] = (
    ("/version", "vllm"),
    ("/server_info", "sglang"),
    ("/get_server_info", "sglang"),  # before 0.5
)
"""In this order: vLLM has /server_info too in some modes, SGLang has no /version."""


def engine_at(url: str, *, timeout_s: float) -> EngineName:
    """Ask the server what it is.

    Raises:
        ServerSyncError: it does not answer within `timeout_s`, or is neither.
    """
    deadline = time.monotonic() + timeout_s
    http = EngineHttp(url)
    seen = []
    try:
        for path, engine in _ROUTES:
            answer = http.request("GET", path, Edge.ATTACH, time_left(deadline))
            if answer.is_success:
                return engine
            seen.append(f"{path} answered {answer.status_code}")
    finally:
        http.close()
    raise ServerSyncError(http.url, Edge.ATTACH, f"it is neither vLLM nor SGLang: {', '.join(seen)}; check the URL")


def control_for(url: str, timeout_s: float) -> EngineControl:
    """A control for the server at `url`; never fails, and takes `timeout_s` at most.

    A server that does not answer gets a LateControl.
    """
    try:
        return _control(url, engine_at(url, timeout_s=timeout_s))
    except ServerSyncError:
        return LateControl(url)


def resolved(control: EngineControl) -> EngineControl:
    """The control of its own engine, whose further calls a transport needs."""
    return control.resolved if isinstance(control, LateControl) else control


class LateControl:
    """An EngineControl for a server that has not answered yet. Each call asks first what it is, until that is known."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._control: EngineControl | None = None
        self._lock = threading.Lock()

    @property
    def engine(self) -> EngineName:
        """Whose routes it has; vllm as long as that is not known."""
        return "vllm" if self._control is None else self._control.engine

    @property
    def is_known(self) -> bool:
        """Whether it has ever answered."""
        return self._control is not None

    @property
    def resolved(self) -> EngineControl:
        """The control of its own engine; itself as long as it has not answered."""
        return self if self._control is None else self._control

    def health(self, *, timeout_s: float) -> None:
        """See EngineControl.health."""
        self._ask(timeout_s).health(timeout_s=timeout_s)

    def world_size(self, *, timeout_s: float) -> int:
        """See EngineControl.world_size."""
        return self._ask(timeout_s).world_size(timeout_s=timeout_s)

    def is_paused(self, *, timeout_s: float) -> bool:
        """See EngineControl.is_paused."""
        return self._ask(timeout_s).is_paused(timeout_s=timeout_s)

    def pause(self, mode: PauseMode, *, recompute: bool, timeout_s: float) -> None:
        """See EngineControl.pause."""
        self._ask(timeout_s).pause(mode, recompute=recompute, timeout_s=timeout_s)

    def resume(self, *, timeout_s: float) -> None:
        """See EngineControl.resume."""
        self._ask(timeout_s).resume(timeout_s=timeout_s)

    def weight_version(self, *, timeout_s: float) -> str:
        """See EngineControl.weight_version."""
        return self._ask(timeout_s).weight_version(timeout_s=timeout_s)

    def reset_prefix_cache(self, *, recompute: bool, timeout_s: float) -> bool:
        """See EngineControl.reset_prefix_cache."""
        return self._ask(timeout_s).reset_prefix_cache(recompute=recompute, timeout_s=timeout_s)

    def load_folder(self, folder: str, weight_version: str, *, timeout_s: float) -> None:
        """See EngineControl.load_folder."""
        self._ask(timeout_s).load_folder(folder, weight_version, timeout_s=timeout_s)

    def load_adapter(self, name: str, folder: str, *, timeout_s: float) -> None:
        """See EngineControl.load_adapter."""
        self._ask(timeout_s).load_adapter(name, folder, timeout_s=timeout_s)

    def prompt_logprobs(self, token_ids: Sequence[int], *, model: str | None = None, timeout_s: float) -> list[float]:
        """See EngineControl.prompt_logprobs."""
        control = self._ask(timeout_s)
        return control.prompt_logprobs(token_ids, model=model, timeout_s=timeout_s)

    def close(self) -> None:
        """See EngineControl.close."""
        if self._control is not None:
            self._control.close()

    def _ask(self, timeout_s: float) -> EngineControl:
        if self._control is None:
            engine = engine_at(self.url, timeout_s=timeout_s)
            with self._lock:
                if self._control is None:
                    self._control = _control(self.url, engine)
        return self._control


def _control(url: str, engine: EngineName) -> EngineControl:
    return SglangControl(url) if engine == "sglang" else VllmControl(url)
