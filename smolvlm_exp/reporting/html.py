"""jinja2 for all HTML: `render` fills a template of `templates/` and escapes whatever it is given."""

import base64
import io
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from smolvlm_exp.utils.formatting import number, percent

if TYPE_CHECKING:
    from PIL.Image import Image

DISPLAY_EDGE = 880  # pixels of a photo's long edge: twice what the page shows, for dense screens
SMALL_EDGE = 256  # up to this size an image is a drawing: embedded as it is, and enlarged by the page


def render(template: str, **data: Any) -> Markup:
    """A filled template as HTML: what is text in `data` is escaped, what was rendered before is not."""
    return Markup(environment().get_template(template).render(data))


@cache
def environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"value": format_value, "number": number, "percent": percent}
    return made


def format_value(value: Any) -> Markup:
    """Any value as text, a dash where there is none."""
    if value is None or value == "":
        return Markup('<span class="none">&ndash;</span>')
    return escape(number(value) if isinstance(value, float) else value)


def highlight(text: str, words: Collection[str]) -> Markup:
    """The text with these words marked, whatever their case, in the plural too."""
    if not words:
        return escape(text)
    longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    pieces = re.split(rf"(?<!\w)((?:{longest_first})(?:e?s)?)(?!\w)", text, flags=re.IGNORECASE)
    mark = Markup("<mark>{}</mark>").format
    return Markup("").join(mark(piece) if i % 2 else piece for i, piece in enumerate(pieces))


def embed(image: "Image") -> dict[str, Any]:
    """The image inside the page: PNG for drawings, JPEG for photos."""
    kind, format = ("small", "png") if max(image.size) <= SMALL_EDGE else ("photo", "jpeg")
    shown = image.convert("RGB")  # a copy
    if kind == "photo":
        shown.thumbnail((DISPLAY_EDGE, DISPLAY_EDGE))
    file = io.BytesIO()
    shown.save(file, format, quality=85)
    source = f"data:image/{format};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"kind": kind, "width": shown.width, "height": shown.height, "src": source}
