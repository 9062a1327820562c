"""What every HTML report of ours shares: the page around it, its tables and facts, its pictures.

Plain functions that return HTML. Whatever comes from outside (names, answers, settings) goes through `html.escape`,
and the page forbids itself, by its own content security policy, to run a script or to load anything.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.utils.formatting import number

if TYPE_CHECKING:
    from PIL.Image import Image

STYLE = Path(__file__).parent / "templates" / "report.css"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
DISPLAY_EDGE = 880  # pixels of a photo's long edge: twice what the page shows, for dense screens
SMALL_EDGE = 256  # up to it a picture is a small drawing: kept to the pixel, and enlarged by the page
NOTHING = '<span class="none">&ndash;</span>'


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole document.

    Args:
        title: plain text.
        header: HTML above the sections.
        sections: (anchor, plain title, HTML).
    """
    nav = "".join(f'<a href="#{key}">{html.escape(name)}</a>' for key, name, _ in sections)
    body = "\n".join(
        f'<section id="{key}"><h2>{html.escape(name)}</h2>{content}</section>' for key, name, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f'<body><main>{header}<nav aria-label="Sections">{nav}</nav>\n{body}</main></body></html>\n'
    )


def table(kind: str, head: Sequence[str], rows: Sequence[str]) -> str:
    """A table of finished <tr> rows that scrolls by itself where the screen is narrow."""
    columns = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def empty(text: str) -> str:
    """The line that stands where there is nothing to show."""
    return f'<p class="empty">{html.escape(text)}</p>'


def definition_list(told: Iterable[tuple[str, Any]]) -> str:
    """Names over values, side by side; a value of None is left out."""
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{format_value(value)}</dd></div>"
        for name, value in told
        if value is not None
    )
    return f'<dl class="facts">{items}</dl>' if items else empty("Nothing was recorded.")


def status_pill(word: str) -> str:
    """A status or a verdict, told by sign, word and colour."""
    sign, tone = {
        "ok": ("✓", "good"),
        "done": ("✓", "good"),
        "warn": ("!", "warning"),
        "stopped": ("!", "warning"),
        "fail": ("✕", "bad"),
        "failed": ("✕", "bad"),
    }.get(word, ("", "plain"))
    return f'<span class="pill {tone}"><span aria-hidden="true">{sign}</span> {html.escape(word)}</span>'


def format_value(value: Any) -> str:
    """Any value as escaped text."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return html.escape(number(value) if isinstance(value, float) else str(value))


def highlight(text: str, targets: Iterable[str]) -> str:
    """Escaped text with these words marked, whatever their case, in the plural too."""
    wanted = sorted({w.strip() for w in targets if w.strip()}, key=len, reverse=True)
    if not wanted:
        return html.escape(text)
    pattern = rf"(?<!\w)((?:{'|'.join(map(re.escape, wanted))})(?:e?s)?)(?!\w)"
    pieces = re.split(pattern, text, flags=re.IGNORECASE)
    return "".join(f"<mark>{html.escape(p)}</mark>" if i % 2 else html.escape(p) for i, p in enumerate(pieces))


def picture(image: "Image") -> str:
    """An <img> with the picture inside: PNG for drawings, JPEG for photos."""
    small = max(image.size) <= SMALL_EDGE
    drawn = image if image.mode == "RGB" else image.convert("RGB")
    if not small:
        drawn = drawn.copy()
        drawn.thumbnail((DISPLAY_EDGE, DISPLAY_EDGE))
    file = io.BytesIO()
    drawn.save(file, "PNG" if small else "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    kind, mime = ("small", "png") if small else ("photo", "jpeg")
    return (
        f'<div class="picture {kind}"><img width="{drawn.width}" height="{drawn.height}" '
        f'alt="The picture of this row" src="data:image/{mime};base64,{data}"></div>'
    )
