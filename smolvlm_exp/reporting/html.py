"""jinja2 for all HTML: `render` fills a template of `templates/` and escapes whatever it is given."""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from smolvlm_exp.utils.formatting import number, percent

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"
DISPLAY_EDGE = 880  # pixels of a photo's long edge: twice what the page shows, for dense screens
SMALL_EDGE = 256  # up to it an image is a drawing: kept to the pixel, and enlarged by the page
NOTHING = Markup('<span class="none">&ndash;</span>')


def render(template: str, **data: Any) -> Markup:
    """A filled template as HTML: what is text in `data` is escaped, what was rendered before is not."""
    return Markup(environment().get_template(template).render(data))


@cache
def environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"value": format_value, "number": number, "percent": percent}
    return made


def format_value(value: Any) -> Markup:
    """Any value as text, a dash where there is none."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return Markup("yes" if value else "no")
    return escape(number(value) if isinstance(value, float) else value)


def highlight(text: str, words: Iterable[str]) -> Markup:
    """The text with these words marked, whatever their case, in the plural too."""
    wanted = sorted({word.strip() for word in words if word.strip()}, key=len, reverse=True)
    if not wanted:
        return escape(text)
    pattern = rf"(?<!\w)((?:{'|'.join(map(re.escape, wanted))})(?:e?s)?)(?!\w)"
    pieces = re.split(pattern, text, flags=re.IGNORECASE)
    return Markup("").join(
        Markup("<mark>{}</mark>").format(piece) if i % 2 else piece for i, piece in enumerate(pieces)
    )


def embed(image: "Image") -> dict[str, Any]:
    """The image inside the page: PNG for drawings, JPEG for photos."""
    small = max(image.size) <= SMALL_EDGE
    shown = image.convert("RGB")  # a copy
    if not small:
        shown.thumbnail((DISPLAY_EDGE, DISPLAY_EDGE))
    file = io.BytesIO()
    shown.save(file, "PNG" if small else "JPEG", quality=85)
    kind, mime = ("small", "png") if small else ("photo", "jpeg")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return {
        "kind": kind, "width": shown.width, "height": shown.height, "src": f"data:image/{mime};base64,{data}",
    }  # fmt: skip


# What follows goes as soon as sweep.html is a template too.
STYLE = TEMPLATES / "report.css"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


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
