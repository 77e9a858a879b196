"""Markdown of committed files as HTML: headings, tables, lists, folded blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from markdown_it import MarkdownIt
from markupsafe import Markup

_TABLE = re.compile(r"<table>(.*?)</table>", re.S)
_TITLE = re.compile(r"<p><strong>([^<]*)</strong></p>\s*<table>")
_HEADER = re.compile(r"<th(?P<rest>[ >])")
_OUTCOME = re.compile(r"<td>(?P<word>(?:not )?reproduced)</td>")
_HEADING = re.compile(r"<(/?)h([1-5])")
_IMAGE = re.compile(r'<img src="([^"]*)"')


def to_html(text: str, *, lower: int = 1, images: Mapping[str, str] | None = None) -> Markup:
    """Convert Markdown.

    Args:
        text: of a committed file; its HTML is kept.
        lower: how many levels lower its headings become.
        images: new place of each image by the one in the text.

    Returns:
        HTML whose tables scroll in their own box, have a caption where a bold line stands above
        them, and headers with a scope.
    """
    html = _converter().render(text)
    html = _HEADING.sub(lambda found: f"<{found[1]}h{min(6, int(found[2]) + lower)}", html)
    html = _TITLE.sub(r"<table><caption>\1</caption>", html)
    html = _TABLE.sub(
        r'<div class="scroll" tabindex="0"><table class="data">\1</table></div>', html
    )
    html = _HEADER.sub(r'<th scope="col"\g<rest>', html)
    html = _OUTCOME.sub(_verdict, html)
    for old, new in (images or {}).items():
        html = html.replace(f'src="{old}"', f'src="{new}" loading="lazy"')
    return Markup(html)


def _verdict(found: re.Match[str]) -> str:
    word = found["word"]
    return f'<td><span class="verdict v-{word.replace(" ", "-")}">{word}</span></td>'


def inline(text: str) -> Markup:
    """One line of Markdown without a paragraph around it."""
    return Markup(_converter().renderInline(text))


def images_in(text: str) -> list[str]:
    """The images that a Markdown text shows, in order, each once."""
    return list(dict.fromkeys(_IMAGE.findall(_converter().render(text))))


@cache
def _converter() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": True}).enable("table")
