"""HTML as plain text: paragraphs, lists and code as Markdown has them, other marks left out."""

import re
from html.parser import HTMLParser

_BLOCKS = frozenset(
    ["p", "div", "blockquote", "ul", "ol", "pre", "table", "tr", "hr", "dl", "dt", "dd"]
    + [f"h{i}" for i in range(1, 7)]
)
_UNSEEN = frozenset(["script", "style", "head", "title"])


def text_of(html: str) -> str:
    """The text that a browser would show, without space around it."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    return parser.text.strip()


class _Text(HTMLParser):
    """text: what was read; lists: of each open list the next item's number, None where it has none.

    mark: where the text behind an item's mark begins, which no line break comes before.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self.lists: list[int | None] = []
        self.mark = self.unseen = self.code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _UNSEEN:
            self.unseen += 1
        elif tag == "br":
            self.text = self.text.rstrip(" ") + "\n"
        elif tag == "li":
            number = self.lists[-1] if self.lists else None
            if number is not None:
                self.lists[-1] = number + 1
            self._break("\n")
            self.text += "  " * (len(self.lists) - 1) + (f"{number}. " if number else "- ")
            self.mark = len(self.text)
        elif tag in ("td", "th"):
            self.text += "" if self.text.endswith((" ", "\n")) else " "
        elif tag in _BLOCKS:
            self._break("\n" if self.lists and tag in ("ul", "ol") else "\n\n")
        if tag in ("ul", "ol"):
            self.lists.append(1 if tag == "ol" else None)
        elif tag == "pre":
            self.text += "```\n"
            self.code += 1
        elif tag == "code" and not self.code:
            self.text += "`"

    def handle_endtag(self, tag: str) -> None:
        if tag in _UNSEEN:
            self.unseen = max(0, self.unseen - 1)
        elif tag == "code" and not self.code:
            self.text += "`"
        elif tag == "pre" and self.code:
            self.code -= 1
            self._break("\n")
            self.text += "```"
        if tag in ("ul", "ol") and self.lists:
            self.lists.pop()
        if tag in _BLOCKS:
            self._break("\n" if self.lists else "\n\n")

    def handle_data(self, data: str) -> None:
        if self.unseen:
            return
        if not self.code:  # where space is one blank, and none begins a line
            data = re.sub(r"\s+", " ", data)
            if self.text.endswith((" ", "\n")) or not self.text:
                data = data.lstrip(" ")
        self.text += data

    def _break(self, lines: str) -> None:
        """End the line, once."""
        if self.text and len(self.text) > self.mark:
            self.text = self.text.rstrip(" \n") + lines
