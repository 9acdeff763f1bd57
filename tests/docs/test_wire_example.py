"""The worked example of docs/wire.md is a group as every client reads it, and the page names every route."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from atroposlib.wire.columns import decode_groups
from rollout_server.app import create_app
from rollout_server.config import ServerConfig

PAGE = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()


def documented_blob() -> bytes:
    headers: list[str] = re.findall(r"```json\n(.*?)\n```", PAGE, flags=re.S)
    dumps: list[str] = re.findall(r"```\n(18 02.*?)```", PAGE, flags=re.S)
    (header,), (dump,) = headers, dumps
    rows = [bytes.fromhex(line.split("  ")[0]) for line in dump.splitlines() if line[0] != "."]
    (length,) = struct.unpack("<Q", rows[0])
    return rows[0] + header.encode().ljust(length) + b"".join(rows[1:])


def test_the_worked_example_decodes_to_what_it_says() -> None:
    blob = documented_blob()

    (group,) = decode_groups(blob)

    assert f"{len(blob)} bytes end here" in PAGE
    assert group.tokens.tolist() == [5, 9, 2]
    assert group.loss_mask.tolist() == [0, 1, 1]
    assert group.policy_versions.tolist() == [[-1, 1], [7, 2]]
    assert group.inference_logprobs is not None
    assert group.inference_logprobs.tolist() == [0.0, -0.5, -0.25]
    assert (group.scores.tolist(), group.cu_seqlens.tolist()) == ([1.0], [0, 3])
    assert (group.group_id, group.env_id, group.ticket, group.version_range) == ("g-1", 0, "t-1", (7, 7))


def test_the_page_names_every_native_route(tmp_path: Path) -> None:
    schema = create_app(ServerConfig(data_dir=tmp_path)).openapi()

    routes = [f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods]
    missing = [route for route in routes if " /v1/" in route and f"`{route}" not in PAGE]

    assert missing == []
