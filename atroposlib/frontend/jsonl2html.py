"""Groups from a JSONL file as an HTML page: `python -m atroposlib.frontend.jsonl2html IN [OUT]`."""

from __future__ import annotations

import argparse
import html
import json
import logging
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("groups.html")
NO_GROUPS = "<p>No group in this file has both messages and scores.</p>"

Group = Mapping[str, Any]


def generate_html(input_path: str, output_path: str | None = None) -> None:
    """Write the page of a groups file.

    Lines without messages and scores, and lines that are not JSON, are left out with a warning.

    Args:
        output_path: by default the same path with the suffix .html.
    Raises:
        SystemExit: with status 1: there is no such file.
    """
    source = Path(input_path)
    if not source.is_file():
        print(f"error: {source} is no file", file=sys.stderr)
        raise SystemExit(1)
    target = Path(output_path) if output_path else source.with_suffix(".html")
    blocks = [create_html_for_group(group, index) for index, group in enumerate(_groups(source))]
    target.write_text(page(source.stem, "\n".join(blocks) or NO_GROUPS), encoding="utf-8")
    log.info("%d groups written to %s", len(blocks), target)


def page(title: str, groups_html: str, *, head: str = "") -> str:
    """A whole page around blocks that are HTML already.

    Args:
        head: more lines of the head, HTML too.
    """
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), groups_html=groups_html, head=head)


def create_html_for_group(group_data: Group, index: int) -> str:
    """One collapsible block: an item for each sequence, with its score. Empty where messages or scores are missing.

    Args:
        group_data: messages[i] is a text, or a list of messages; the longer of messages and scores is cut.
    """
    messages, scores = group_data.get("messages"), group_data.get("scores")
    if not messages or not scores:
        return ""
    items = "\n".join(_item(*pair) for pair in zip(messages, scores, strict=False))
    shown = ", ".join(_score(score) for score in scores)
    return (
        f'<details class="group"><summary>Group {index + 1} <span class="score">{shown}</span></summary>\n'
        f"{items}\n</details>"
    )


def get_score_class(score: float) -> str:
    """The CSS class of a score: by its sign."""
    if score > 0:
        return "reward-positive"
    return "reward-negative" if score < 0 else "reward-zero"


def render_markdown(text: str) -> str:
    """Markdown as HTML, with fenced code, tables and line breaks. HTML in it is shown, not obeyed."""
    rendered: str = _markdown().render(text)
    return rendered


def _item(messages: Any, score: Any) -> str:
    body = render_markdown(messages) if isinstance(messages, str) else "".join(map(_message, messages))
    css = get_score_class(score) if isinstance(score, int | float) else "reward-zero"
    return f'<div class="item {css}"><span class="score">{_score(score)}</span>\n{body}</div>'


def _message(message: Any) -> str:
    if not isinstance(message, Mapping):
        return render_markdown(str(message))
    role = html.escape(str(message.get("role", "")))
    return f'<div class="role">{role}</div>{render_markdown(content_text(message.get("content")))}'


def content_text(content: Any) -> str:
    """The text of a message's content: a text, a list of parts, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "\n\n".join(_part_text(part) for part in content)
    return str(content)


def _part_text(part: Any) -> str:
    if isinstance(part, Mapping):
        return str(part["text"]) if "text" in part else f"[{part.get('type', 'part')}]"
    return str(part)


def _score(score: Any) -> str:
    return f"{score:.3f}" if isinstance(score, float) else html.escape(str(score))


def _groups(path: Path) -> Iterator[Group]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                group = json.loads(line)
            except ValueError:
                log.warning("%s line %d is not JSON; left out", path, number)
                continue
            if isinstance(group, dict) and group.get("messages") and group.get("scores"):
                yield group
            else:
                log.warning("%s line %d lacks messages or scores; left out", path, number)


@lru_cache(maxsize=1)
def _markdown() -> Any:
    # Imported here: environments import this module and may never write a page.
    from markdown_it import MarkdownIt

    # linkify and raw HTML stay off; images are off too: a model's reply must not make a reader's browser call home.
    return MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table").disable("image")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m atroposlib.frontend.jsonl2html", description="Write an HTML page of a groups file."
    )
    parser.add_argument("input_path", metavar="IN", help="JSONL file of groups")
    parser.add_argument("output_path", metavar="OUT", nargs="?", help="default: IN with the suffix .html")
    arguments = parser.parse_args(argv)
    generate_html(arguments.input_path, arguments.output_path)


if __name__ == "__main__":
    main()
