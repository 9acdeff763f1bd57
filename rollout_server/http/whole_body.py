"""Large bodies straight into one buffer: from the socket to the bytes that are checked and stored, with no copy in between.

uvicorn hands a body over in pieces, each copied four times on its way. A route that wants a body whole asks for it through the
ASGI extension EXTENSION; where a server does not offer it (tests, other servers), the pieces still come through receive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from atroposlib.errors import BodyEncodingError

EXTENSION = "atropos.whole_body"
"""In scope["extensions"]: a Takeover."""


class BodyBuffer(asyncio.BufferedProtocol):
    """A connection's protocol for as long as the rest of one body comes in.

    Args:
        size: bytes of the body.
        head: what came in before this buffer was there.
        owner: the connection's protocol before and afterwards.
        on_end: called when the connection is the owner's again, with whether the body is whole.
    """

    def __init__(
        self,
        size: int,
        head: bytes | bytearray,
        *,
        owner: asyncio.Protocol,
        transport: asyncio.Transport,
        on_end: Callable[[bool], None],
    ) -> None:
        # Not a bytearray: that would be filled with zeros first.
        self._view = np.empty(size, dtype=np.uint8).data
        self._owner = owner
        self._transport = transport
        self._on_end = on_end
        self.received = len(head)
        self.done: asyncio.Future[memoryview] = asyncio.get_running_loop().create_future()
        self._view[: len(head)] = head
        if self.received == size:
            self.done.set_result(self._view)
        else:
            transport.set_protocol(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes belong; never more room than the body has left."""
        return self._view[self.received :]

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes more are there."""
        self.received += nbytes
        if self.received == len(self._view) and not self.done.done():
            self.done.set_result(self._view)
            self._hand_back(is_whole=True)

    def eof_received(self) -> None:
        """The sender is done early: the connection closes."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The owner learns it too."""
        if not self.done.done():
            text = f"the connection closed after {self.received} bytes, inside the body; send whole bodies"
            self.done.set_exception(BodyEncodingError(text))
        self._owner.connection_lost(exc)

    def pause_writing(self) -> None:
        """The owner's, who writes."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """The owner's, who writes."""
        self._owner.resume_writing()

    def give_up(self) -> None:
        """Nobody wants the body any more."""
        if not self.done.done():
            self.done.cancel()
            self._hand_back(is_whole=False)

    def _hand_back(self, *, is_whole: bool) -> None:
        self._transport.set_protocol(self._owner)
        self._on_end(is_whole)


Takeover = Callable[[int], BodyBuffer | None]
"""Bytes of the body to the buffer that fills; None where the body has to come through receive."""
