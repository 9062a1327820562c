"""The page at /: one file, whose script and style alone a browser may run, and which asks nobody but this server."""

import base64
import hashlib
import random
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from smolvlm_exp.data.scenes import draw, draw_scene_content
from smolvlm_exp.data.sources.photos import FOLDER
from smolvlm_exp.reporting import html

SCENES = (["star", "heart"], ["moon", "arrow", "ring"])
PHOTOS = ("cat.jpg", "coffee.jpg")
QUESTION = "Describe the picture."


def page() -> tuple[str, dict[str, str]]:
    """Its HTML and its headers."""
    style, script = (
        (Path(html.__file__).parent / "templates" / f"chat.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    policy = (
        f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html.render("chat.html.jinja", style=Markup(style), script=Markup(script)), headers


def digest(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def examples(model_id: str) -> list[dict[str, Any]]:
    """Images to ask about: drawn scenes for the embedded model, which knows no others, else photos."""
    if model_id == "embedded":
        rng = random.Random(3)
        images = [draw(draw_scene_content(rng, kinds), rng) for kinds in SCENES]
    else:
        images = [Image.open(FOLDER / name) for name in PHOTOS]
    return [{"question": QUESTION, "image": html.embed(image)["src"]} for image in images]
