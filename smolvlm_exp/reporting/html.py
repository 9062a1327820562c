"""jinja2 for all HTML: `render` fills a template of `templates/` and escapes whatever it is given."""

import base64
import hashlib
import io
import re
from collections.abc import Collection, Iterable
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from smolvlm_exp.utils.formatting import number, percent

if TYPE_CHECKING:
    from PIL.Image import Image

EDGES = (880, 640, 480, 360, 256)  # pixels of a photo's long edge; 880: twice what the page shows, for dense screens
IMAGE_BYTES = 32_000  # of one image: two dozen of them leave a page below 1.5 MB
IMAGES = "images.json"  # in a run's folder: the images of the report's samples, embedded, by row
SMALL_EDGE = 256  # up to this size an image is a drawing: embedded as it is, and enlarged by the page


def render(template: str, **data: Any) -> Markup:
    """A filled template as HTML: what is text in `data` is escaped, what was rendered before is not."""
    return Markup(environment().get_template(template).render(data))


@cache
def environment() -> Environment:
    templates = Path(__file__).parent / "templates"
    loader = FileSystemLoader(templates)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script = (templates / "tables.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals |= {"script": Markup(script), "script_hash": f"sha256-{digest}"}
    made.filters |= {"value": format_value, "number": number, "percent": percent}
    return made


def format_value(value: Any) -> Markup:
    """Any value as text, a dash where there is none."""
    if value is None or value == "":
        return Markup('<span class="none">&ndash;</span>')
    return escape(number(value) if isinstance(value, float) else value)


def pieces(text: str, words: Collection[str]) -> list[tuple[str, bool]]:
    """Words, what stands between them, and whether each is one of `words`, whatever its case, in the plural too."""
    longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    parts = re.split(rf"(?<!\w)((?:{longest_first})(?:e?s)?)(?!\w)", text, flags=re.IGNORECASE) if words else [text]
    split = [[part] if i % 2 else re.findall(r"\w+|\W+", part) for i, part in enumerate(parts)]
    return [(piece, bool(i % 2)) for i, own in enumerate(split) for piece in own]


def highlight(text: str, words: Collection[str]) -> Markup:
    """The text with these words marked."""
    return marked(pieces(text, words))


def marked(text: Iterable[tuple[str, bool]]) -> Markup:
    mark = Markup("<mark>{}</mark>").format
    return Markup("").join(mark(piece) if is_marked else escape(piece) for piece, is_marked in text)


def highlight_changes(
    old: str, new: str, old_words: Collection[str] = (), new_words: Collection[str] = ()
) -> tuple[Markup, Markup]:
    """As `highlight`, both texts, with what the other has not in `del` and `ins`."""
    a, b = pieces(old, old_words), pieces(new, new_words)
    matcher = SequenceMatcher(str.isspace, [piece for piece, _ in a], [piece for piece, _ in b], autojunk=False)
    first, second = Markup(""), Markup("")
    for what, start_a, end_a, start_b, end_b in matcher.get_opcodes():
        left, right = marked(a[start_a:end_a]), marked(b[start_b:end_b])
        same = what == "equal"
        first += left if same or not left else Markup("<del>{}</del>").format(left)
        second += right if same or not right else Markup("<ins>{}</ins>").format(right)
    return first, second


def embed(image: "Image") -> dict[str, Any]:
    """The image inside the page: PNG for drawings, JPEG for photos, of IMAGE_BYTES at most or of the smallest edge."""
    kind = "small" if max(image.size) <= SMALL_EDGE else "photo"
    for edge in EDGES:
        shown = image.convert("RGB")  # a copy
        shown.thumbnail((edge, edge))
        format = "png" if kind == "small" and edge == EDGES[0] else "jpeg"
        file = io.BytesIO()
        shown.save(file, format, quality=80)
        if file.tell() <= IMAGE_BYTES:
            break
    source = f"data:image/{format};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"kind": kind, "width": shown.width, "height": shown.height, "src": source}
