"""jinja2 for all HTML: `render` fills a template of `templates/` and escapes whatever it is given."""

import base64
import io
import re
from collections.abc import Iterable
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
