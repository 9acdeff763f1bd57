"""The page of a groups file: readable, complete, and safe to open."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.frontend.jsonl2html import create_html_for_group, generate_html, get_score_class, render_markdown


def chat(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant"), contents, strict=False)]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_every_sequence_of_every_group_is_on_the_page_with_its_score(tmp_path: Path) -> None:
    groups = [{"messages": [chat("2+2?", f"four {i}"), "plain text"], "scores": [0.5, -1]} for i in range(3)]
    source = write(tmp_path / "run.jsonl", *groups)

    generate_html(str(source))

    page = (tmp_path / "run.html").read_text()
    assert page.count('<details class="group">') == 3
    assert page.count('class="item reward-positive"') == page.count('class="item reward-negative"') == 3
    assert all(text in page for text in ("four 2", "plain text", "assistant", "0.500", "<title>run</title>", "Group 3"))


def test_lines_that_cannot_be_shown_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"messages": ["good"], "scores": [1.0]}
    source = write(tmp_path / "a.jsonl", "{torn", {"scores": [1.0]}, {"messages": ["x"]}, "3", good)

    generate_html(str(source), str(tmp_path / "out.html"))

    assert (tmp_path / "out.html").read_text().count('<details class="group">') == 1
    assert [record.args[1] for record in caplog.records if record.levelname == "WARNING"] == [1, 2, 3, 4]  # type: ignore[index]


def test_a_file_without_such_groups_says_so(tmp_path: Path) -> None:
    generate_html(str(write(tmp_path / "a.jsonl", {"scores": [1.0]})))

    assert "No group in this file" in (tmp_path / "a.html").read_text()


def test_a_missing_file_ends_with_status_1(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_info:
        generate_html(str(tmp_path / "none.jsonl"))
    assert exit_info.value.code == 1


def test_the_longer_of_messages_and_scores_is_cut() -> None:
    assert create_html_for_group({"messages": ["a", "b", "c"], "scores": [1, 2]}, 0).count('class="item') == 2
    assert create_html_for_group({"messages": ["a"], "scores": [1, 2]}, 0).count('class="item') == 1
    assert create_html_for_group({"scores": [1]}, 0) == ""


@pytest.mark.parametrize(
    ("score", "css"),
    [(0.1, "reward-positive"), (0, "reward-zero"), (-3, "reward-negative"), (float("nan"), "reward-zero")],
)
def test_the_class_of_a_score_is_its_sign(score: float, css: str) -> None:
    assert get_score_class(score) == css


def test_markdown_has_code_tables_and_line_breaks() -> None:
    html = render_markdown("one\ntwo\n\n```python\nx < 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")

    assert "one<br" in html
    assert "x &lt; 1" in html
    assert "<td>2</td>" in html


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://evil.example/pixel)",
    "[x](javascript:alert(1))",
    "```\n</pre><script>alert(1)</script>\n```",
    "| a |\n|---|\n| <b onclick=alert(1)>x</b> |",
    "</details></div><iframe src=//evil.example>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_writes_is_shown_not_obeyed(text: str, tmp_path: Path) -> None:
    message = {"role": text, "content": [{"type": "text", "text": text}, {"type": "image_url"}]}
    source = write(tmp_path / "a.jsonl", {"messages": [text, [message], [text]], "scores": [1, text, 0]})

    generate_html(str(source))

    tags = Tags((tmp_path / "a.html").read_text()).found
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "details", "summary", "span", "div", "p", "pre",
               "code", "table", "thead", "tbody", "tr", "th", "td", "br", "a"}  # fmt: skip
    attributes = [(name, value or "") for _, attributes in tags for name, value in attributes.items()]
    assert {tag for tag, _ in tags} <= allowed
    assert {name for name, _ in attributes} <= {"class", "href", "charset", "name", "content", "http-equiv", "lang"}
    assert all(value.startswith("http://") for name, value in attributes if name == "href"), "nothing loads or runs"


@given(st.text())
def test_any_text_gives_balanced_blocks(text: str) -> None:
    block = create_html_for_group({"messages": [text, chat(text, text)], "scores": [1, 0]}, 0)

    tags = [tag for tag, _ in Tags(block).found]
    assert tags.count("details") == block.count("</details>") == 1
    assert tags.count("div") == block.count("</div>")


def test_odd_contents_are_shown_too() -> None:
    for content in (None, 3, [], [{"type": "text", "text": "part"}, "bare"], {"a": 1}):
        assert "assistant" in create_html_for_group({"messages": [chat("q", content)], "scores": [1]}, 0)


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"messages": ["hello"], "scores": [1.0]})

    command = [sys.executable, "-m", "atroposlib.frontend.jsonl2html", str(source), str(tmp_path / "b.html")]
    subprocess.run(command, check=True, timeout=30)

    assert "hello" in (tmp_path / "b.html").read_text()
