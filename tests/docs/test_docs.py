"""What the documentation shows works as it stands there."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from atroposlib.testing.byte_tokenizer import byte_tokenizer, save_byte_tokenizer
from atroposlib.testing.mock_inference import MockInferenceServer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets() -> list[pytest.param]:  # type: ignore[valid-type]
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S))
    ]


@pytest.mark.parametrize("code", snippets())
async def test_an_environment_from_the_docs_makes_groups(code: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    file = tmp_path / "documented_env.py"
    file.write_text(code)
    replies = ["Paris Rome Tokyo", "7"]

    async with MockInferenceServer(lambda prompt, index: tokenizer.encode(f"{replies[index % 2]}<|im_end|>")) as engine:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(file), "process", "--total_steps", "2", "--group_size", "2",
            "--tokenizer_name", save_byte_tokenizer(tmp_path / "tokenizer"),
            "--data_path_to_save_groups", str(tmp_path / "groups.jsonl"),
            "--openai.base_url", engine.url, "--openai.model_name", "mock", "--openai.server_type", "vllm",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(60):
            output, _ = await process.communicate()

    assert process.returncode == 0, output.decode()
    groups = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert len(groups) == 2
    assert all(len(group["tokens"]) == 2 for group in groups)


def test_the_readmes_environment_has_at_most_15_lines() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)

    assert len([line for line in code.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]

    assert missing == []


def test_config_md_lists_the_options_that_exist() -> None:
    result = subprocess.run(
        [sys.executable, "scripts/config_md.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )

    assert result.returncode == 0, result.stderr
