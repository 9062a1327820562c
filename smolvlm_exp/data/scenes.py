"""Scenes of coloured shapes: what is in them, and how they are drawn. The random generator determines both."""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

KINDS = (
    "circle", "square", "triangle", "star", "heart", "moon",
    "ring", "cross", "arrow", "diamond", "hexagon", "bolt",
)  # fmt: skip
COLOURS = {
    "red": (225, 40, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 225, 50),
    "green": (40, 170, 70),
    "blue": (45, 95, 235),
    "purple": (150, 60, 200),
    "pink": (255, 150, 195),
    "white": (250, 250, 250),
}
SIZES = {"small": 0.56, "large": 0.92}  # the side of a shape, as a share of its cell
CELL = 32  # pixels: a scene is a grid of cells with at most one shape in each

# Canvas in cells (columns, rows), and how often. With 64-pixel tiles the flat ones make two tiles and a global one,
# the square one four and a global one.
CANVASES = {(4, 2): 0.6, (2, 4): 0.2, (4, 4): 0.2}


@dataclass(frozen=True)
class Group:
    """`count` shapes of one kind, colour and size. A kind occurs in one group of a scene at most."""

    kind: str
    colour: str
    size: str
    cells: tuple[tuple[int, int], ...]  # (column, row) of each

    @property
    def count(self) -> int:
        return len(self.cells)


@dataclass(frozen=True)
class Scene:
    columns: int
    rows: int
    groups: tuple[Group, ...]  # in reading order: by the leftmost cell, then the topmost

    @property
    def kinds(self) -> list[str]:
        return [group.kind for group in self.groups]


def draw_scene_content(rng: random.Random, kinds: list[str]) -> Scene:
    """Place the given kinds, one group each, on a random canvas."""
    columns, rows = rng.choices(list(CANVASES), weights=list(CANVASES.values()))[0]
    free = [(c, r) for c in range(columns) for r in range(rows)]
    rng.shuffle(free)
    groups = []
    for position, kind in enumerate(kinds):
        later = len(kinds) - position - 1  # groups still to come, which need a cell each
        count = min(rng.choices((1, 2, 3), weights=(0.75, 0.17, 0.08))[0], len(free) - later)
        cells = tuple(sorted(free.pop() for _ in range(count)))
        groups.append(Group(kind, rng.choice(list(COLOURS)), rng.choice(list(SIZES)), cells))
    return Scene(columns, rows, tuple(sorted(groups, key=lambda group: group.cells[0])))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB image of 32 pixels per cell, drawn at twice the size and shrunk for smooth edges."""
    cell = 2 * CELL
    image = background(scene.columns * cell, scene.rows * cell, rng)
    pen = ImageDraw.Draw(image)
    for group in scene.groups:
        side = SIZES[group.size] * cell * rng.uniform(0.94, 1.04)
        slack = max(cell - side, 0) / 2
        for column, row in group.cells:
            x = (column + 0.5) * cell + rng.uniform(-slack, slack)
            y = (row + 0.5) * cell + rng.uniform(-slack, slack)
            colour = tuple(max(0, min(255, channel + rng.randint(-12, 12))) for channel in COLOURS[group.colour])
            draw_shape(pen, group.kind, x, y, side / 2, colour)
    return image.resize((scene.columns * CELL, scene.rows * CELL), Image.Resampling.BOX)


def background(width: int, height: int, rng: random.Random) -> Image.Image:
    """A dim texture: plain, gradient, stripes, checks or dots, with grain. No shape's colour comes near it."""
    base = tuple(rng.randint(35, 95) for _ in range(3))
    other = tuple(max(0, min(120, channel + rng.choice((-1, 1)) * rng.randint(10, 22))) for channel in base)
    image = Image.new("RGB", (width, height), base)
    pen = ImageDraw.Draw(image)
    texture, step = rng.choice(("plain", "gradient", "stripes", "checks", "dots")), rng.randint(10, 24)
    if texture == "gradient":
        mask = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
        image = Image.composite(Image.new("RGB", (width, height), other), image, mask)
    elif texture == "stripes":
        for x in range(-height, width, 2 * step):
            pen.line([(x, height), (x + height, 0)], fill=other, width=step // 2)
    elif texture == "checks":
        for x in range(0, width, step):
            for y in range((x // step) % 2 * step, height, 2 * step):
                pen.rectangle([x, y, x + step - 1, y + step - 1], fill=other)
    elif texture == "dots":
        for x in range(0, width, step):
            for y in range(0, height, step):
                pen.ellipse([x, y, x + step // 3, y + step // 3], fill=other)
    grain = Image.frombytes("L", (width // 4, height // 4), rng.randbytes(width // 4 * (height // 4)))
    grain = grain.resize((width, height), Image.Resampling.NEAREST).convert("RGB")
    return Image.blend(image, grain, 0.05)


def draw_shape(pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, colour: tuple[int, ...]) -> None:
    """One shape of half-side `r` pixels, centred on (x, y)."""
    if kind == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)
    elif kind == "ring":
        pen.ellipse([x - r, y - r, x + r, y + r], outline=colour, width=max(2, round(r * 0.38)))
    else:
        pen.polygon([(x + r * u, y + r * v) for u, v in OUTLINES[kind]], fill=colour)


Corners = list[tuple[float, float]]


def regular(corners: int, turn: float) -> Corners:
    angles = [2 * math.pi * i / corners + turn for i in range(corners)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def moon() -> Corners:
    """A crescent: along the disc, and back along the edge of a second one that covers part of it."""
    outer = [math.radians(40 + 280 * i / 24) for i in range(25)]
    inner = [math.radians(300 - 240 * i / 24) for i in range(25)]
    crescent = [(math.cos(a), math.sin(a)) for a in outer]
    return crescent + [(0.36 + 0.72 * math.cos(a), 0.86 * math.sin(a)) for a in inner]


def heart() -> Corners:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16)
        for a in angles
    ]


# Corners on the square from (-1, -1) to (1, 1), y pointing down.
OUTLINES: dict[str, Corners] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "hexagon": regular(6, 0.0),
    "star": [(s * u, s * v) for i, (u, v) in enumerate(regular(10, -math.pi / 2)) for s in ((1.0, 0.42)[i % 2],)],
    "cross": [(-.32, -1), (.32, -1), (.32, -.32), (1, -.32), (1, .32), (.32, .32),
              (.32, 1), (-.32, 1), (-.32, .32), (-1, .32), (-1, -.32), (-.32, -.32)],
    "arrow": [(-1, -.28), (.1, -.28), (.1, -.8), (1, 0), (.1, .8), (.1, .28), (-1, .28)],
    "bolt": [(.15, -1), (-.6, .15), (-.08, .15), (-.3, 1), (.6, -.25), (.06, -.25), (.5, -1)],
    "heart": heart(),
    "moon": moon(),
}  # fmt: skip
