"""How task=preview is shown: each row's tiles, its texts as the model reads them, and what of them is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from PIL import Image

from smolvlm_exp.reporting.html import embed, render

THUMBNAIL, GAP = 128, 4  # pixels: of a tile's edge, and between two
PAPER = (236, 236, 236)  # behind the tiles, in both colour schemes


@dataclass(frozen=True)
class Side:
    name: str  # prompt, chosen, rejected
    text: str
    tokens: int


@dataclass(frozen=True)
class PreviewedRow:
    sizes: Sequence[tuple[int, int]]  # width, height of each image
    grids: Sequence[tuple[int, int]]  # rows, columns of each image's tiles; 0, 0: not split
    tiles: torch.Tensor  # (n, 3, S, S) uint8, of all images, each image's whole last
    image_tokens: int
    sides: Sequence[Side]
    cut: int  # tokens of the longer answer that data.max_length cuts off
    trained: int  # tokens
    trained_image_tokens: int  # of those: 0, unless something is wrong
    truth: str

    def facts(self) -> list[tuple[str, str]]:
        """What is shown beside the texts, by name."""
        images = ", ".join(
            f"{width}x{height} as {f'{down} x {across} tiles and the whole' if down else '1 tile'}"
            for (width, height), (down, across) in zip(self.sizes, self.grids, strict=True)
        )
        found = [("images", f"{images}: {self.image_tokens} tokens")]
        if self.cut > 0:
            found.append(("cut", f"{self.cut} tokens of the longer answer, by data.max_length"))
        return found + ([("truth", self.truth)] if self.truth else [])

    def as_text(self) -> str:
        texts = [
            (f"{side.name}, {side.tokens} tokens{'' if side.name == 'prompt' else ', trained on'}", side.text)
            for side in self.sides
        ]
        return "\n".join(f"{name}: {text}" for name, text in [*self.facts(), *texts])

    def card(self) -> dict[str, Any]:
        heading = f"{self.trained} of {sum(side.tokens for side in self.sides)} tokens trained on"
        texts = [
            (f"{side.name}, {side.tokens} tokens", side.text, "label" if side.name == "prompt" else "model")
            for side in self.sides
        ]
        facts = [(name, text, "label") for name, text in self.facts()]
        sheet, alt = contact_sheet(self.tiles, self.grids), f"The tiles of this row: {facts[0][1]}"
        return {"image": embed(sheet), "alt": alt, "question": heading, "lines": texts + facts}


def contact_sheet(tiles: torch.Tensor, grids: Sequence[tuple[int, int]]) -> Image.Image:
    """All tiles as one picture: each image's in their rows and columns, with the whole image behind the first row.

    Args:
        tiles: (n, 3, S, S) uint8.
    """
    edge = min(THUMBNAIL, tiles.shape[-1])
    step, at = edge + GAP, iter(tiles.permute(0, 2, 3, 1).numpy())
    heights = [max(down, 1) for down, _ in grids]
    width = max(across for _, across in grids) + 1
    sheet = Image.new("RGB", (width * step - GAP, sum(heights) * step - GAP), PAPER)
    top = 0
    for (down, across), height in zip(grids, heights, strict=True):
        places = [(row, column) for row in range(down) for column in range(across)] + [(0, across)]
        for row, column in places:
            small = Image.fromarray(next(at)).resize((edge, edge))
            sheet.paste(small, (column * step, (top + row) * step))
        top += height
    return sheet


def preview_page(
    settings: dict[str, str], totals: str, rows: Sequence[PreviewedRow], problems: Sequence[str]
) -> Markup:
    """
    Args:
        problems: of bad rows among the first.
    """
    cards = [row.card() for row in rows]
    return render("preview.html.jinja", heading="Rows", lead=totals, about=settings.items(), rows=cards, bad=problems)
