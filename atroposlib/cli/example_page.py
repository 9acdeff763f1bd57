"""A page of the groups that a rollout server received last, served on this machine only. It reads; it changes nothing."""

from __future__ import annotations

import base64
import binascii
import html
import logging
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from atroposlib.cli.old_routes import OldRoutes
from atroposlib.errors import AtroposError
from atroposlib.frontend.jsonl2html import create_html_for_group, page

log = logging.getLogger(__name__)

GROUPS_KEPT = 16
REFRESH_S = 5
LOOPBACK = "127.0.0.1"
LOCAL_NAMES = ("localhost", LOOPBACK)
REFRESH = f'<meta http-equiv="refresh" content="{REFRESH_S}">\n'

Decode = Callable[[list[int]], str]


class Examples:
    """The groups seen so far, the newest first.

    Args:
        routes: of the rollout server; only GET /latest_example is asked.
        decode: tokens to text, for groups without messages.
        has_images: show the images of a group.
    """

    def __init__(self, routes: OldRoutes, decode: Decode, *, has_images: bool = False) -> None:
        self._routes, self._decode, self._has_images = routes, decode, has_images
        self._groups: deque[dict[str, Any]] = deque(maxlen=GROUPS_KEPT)
        self._count = 0

    def look(self) -> None:
        """Ask for the newest group; keep it where it is another one.

        Raises:
            AtroposError: the server does not answer.
        """
        group = self._routes.get("/latest_example")
        if group.get("tokens") and (not self._groups or group != self._groups[0]):
            self._groups.appendleft(group)
            self._count += 1

    def html(self) -> str:
        """The page, after a look."""
        try:
            self.look()
            note = "" if self._groups else "<p>No group has arrived yet.</p>"
        except AtroposError as error:
            note = f"<p>{html.escape(str(error))}</p>"
        blocks = "\n".join(self._block(group, self._count - 1 - place) for place, group in enumerate(self._groups))
        return page(f"Groups at {self._routes.url}", note + blocks, head=REFRESH)

    def _block(self, group: dict[str, Any], index: int) -> str:
        messages = group.get("messages") or [self._decode(tokens) for tokens in group["tokens"]]
        block = create_html_for_group({**group, "messages": messages}, index).replace("<details", "<details open", 1)
        images = "".join(f'<img alt="image" src="{url}">' for url in image_urls(group.get("images")))
        return block + images if self._has_images else block


def image_urls(images: Any) -> Iterator[str]:
    """Data URLs of the first image of a group: nested lists of base64 texts, with or without the head of a data URL."""
    while isinstance(images, list) and images:
        images = images[0]
    if isinstance(images, str):
        data = images.partition("base64,")[2] if images.startswith("data:") else images
        try:
            kind = _image_kind(base64.b64decode(data, validate=True))
        except binascii.Error:
            return
        yield f"data:image/{kind};base64,{data}"


def _image_kind(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return "jpeg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return "gif" if data.startswith(b"GIF8") else "png"


def page_server(examples: Examples, port: int) -> ThreadingHTTPServer:
    """A server of the page on the loopback interface; the caller runs and closes it.

    Args:
        port: 0: any that is free.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A web page elsewhere may point its own name at this machine to read what is shown here.
            is_local = self.headers.get("Host", "").rpartition(":")[0] in LOCAL_NAMES
            status, text = (200, examples.html()) if is_local and self.path == "/" else (404, "not here")
            body = text.encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
            log.debug(format, *args)

    return ThreadingHTTPServer((LOOPBACK, port), Handler)
