"""Markdown as HTML: headings, tables, lists, folded blocks; HTML in a text is shown as text.

The texts of a results directory may come from anybody, so no tag of theirs becomes one of the page.
The one block that Markdown has no sign for is recognised by its lines:
`<details><summary>title</summary>`, an empty line, anything, `</details>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from html import escape, unescape

from markdown_it import MarkdownIt
from markupsafe import Markup

_TABLE = re.compile(r"<table>(.*?)</table>", re.S)
_TITLE = re.compile(r"<p><strong>([^<]*)</strong></p>\s*<table>")
_HEADER = re.compile(r"<th(?P<rest>[ >])")
_OUTCOME = re.compile(r"<td>(?P<word>(?:not )?reproduced)</td>")
_HEADING = re.compile(r"<(/?)h([1-5])")
_IMAGE = re.compile(r'<img src="([^"]*)"')
_FOLDED = re.compile(
    r"^<details><summary>(?P<title>[^\n]*)</summary>\n\n(?P<body>.*?)^</details>$", re.S | re.M
)
# Around the number of what is put in once Markdown is done with the rest: no text has these.
_MARKS = "\ue000\ue001"


def to_html(text: str, *, lower: int = 1, images: Mapping[str, str] | None = None) -> Markup:
    """Convert Markdown.

    Args:
        text: of a file.
        lower: how many levels lower its headings become.
        images: new place of each image by the one in the text.

    Returns:
        HTML whose tables scroll in their own box, have a caption where a bold line stands above
        them, and headers with a scope.
    """
    later = Later()

    def fold(found: re.Match[str]) -> str:
        title = escape(unescape(found["title"]), quote=False)
        body = to_html(found["body"], lower=lower, images=images)
        block = later.mark(f"<details><summary>{title}</summary>\n{body}</details>", block=True)
        return f"\n\n{block}\n\n"

    html = _converter().render(_FOLDED.sub(fold, later.unmarked(text)))
    html = _HEADING.sub(lambda found: f"<{found[1]}h{min(6, int(found[2]) + lower)}", html)
    html = _TITLE.sub(r"<table><caption>\1</caption>", html)
    html = _TABLE.sub(
        r'<div class="scroll" tabindex="0"><table class="data">\1</table></div>', html
    )
    html = _HEADER.sub(r'<th scope="col"\g<rest>', html)
    html = _OUTCOME.sub(_verdict, html)
    for old, new in (images or {}).items():
        html = html.replace(f'src="{old}"', f'src="{new}" loading="lazy"')
    return Markup(later.put_into(html))


class Later:
    """Pieces of HTML that are put into a text after Markdown has been converted.

    A mark stands for each of them until then, so that Markdown neither shows nor changes them.

    Args:
        marks: two characters that enclose the number of a piece.
    """

    def __init__(self, marks: str = _MARKS):
        self._marks = marks
        self._pieces: list[str] = []
        self._blocks: set[int] = set()

    def mark(self, piece: str, *, block: bool = False) -> str:
        """What stands for a piece of HTML in the Markdown.

        Args:
            piece: the HTML.
            block: whether it is to have no paragraph around it where it stands alone.
        """
        if block:
            self._blocks.add(len(self._pieces))
        self._pieces.append(piece)
        return f"{self._marks[0]}{len(self._pieces) - 1}{self._marks[1]}"

    def unmarked(self, text: str) -> str:
        """A text without the characters of the marks."""
        return text.translate(dict.fromkeys(map(ord, self._marks)))

    def put_into(self, html: str) -> str:
        """HTML with the pieces in place of their marks."""
        number = f"{self._marks[0]}([0-9]+){self._marks[1]}"

        def alone(found: re.Match[str]) -> str:
            place = int(found[1])
            return self._pieces[place] if place in self._blocks else found[0]

        html = re.sub(f"<p>{number}</p>", alone, html)
        return re.sub(number, lambda found: self._pieces[int(found[1])], html)


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
    return MarkdownIt("commonmark", {"html": False}).enable("table")
