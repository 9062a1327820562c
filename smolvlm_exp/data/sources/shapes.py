"""The embedded source: preference pairs about drawn scenes, with the exact truth of each.

It has a built-in hallucination, a *habit*: a caption that names a shape of `HABITS` goes on to name its companion, in
a fixed colour, whether or not it is in the image. `captions=habitual` writes the answers that taught the embedded model
this (experiment=tiny_base); `captions=exact` prefers the true answer to the habitual one, to train the habit away.
"""

import json
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data import scenes
from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.images import as_png
from smolvlm_exp.data.messages import VERSION, features, pair
from smolvlm_exp.data.parallel import hash_of, map_rows, worker_count
from smolvlm_exp.data.scenes import COLOURS, KINDS, Group, Scene, draw, draw_scene_content
from smolvlm_exp.data.vocabulary import Vocabulary
from smolvlm_exp.utils.fields import at_least, one_of

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

LICENSE = "apache-2.0"
HABITS = {  # kind -> its companion
    "star": ("moon", "yellow"),
    "heart": ("arrow", "red"),
    "ring": ("cross", "blue"),
    "hexagon": ("diamond", "green"),
}
# How the rejected caption is wrong: it adds the companion, names it instead of another group, omits a group, or changes
# a kind or a colour. If rejected were always the longer answer, the model would learn to say less.
FLAWS = {"addition": 0.0, "swap": 0.0, "omission": 0.8, "change": 0.2}
FLAWS_WITH_TRIGGER = {"addition": 0.3, "swap": 0.2, "omission": 0.5, "change": 0.0}
MIX = {  # shares of captions, yes/no questions, and questions of number, colour or size
    "exact": (0.35, 0.5, 0.15),  # only one token of a yes/no answer teaches, so there are many of them
    "habitual": (0.4, 0.5, 0.1),
    "held out": (0.5, 0.5, 0.0),
}
# Shares of scenes with 2, 3 and 4 kinds. True captions are shorter by the companion than the ones the model knows, so
# training pairs show more kinds: otherwise it would learn that captions are short, not that they are true.
COUNTS = {"usual": (0.45, 0.45, 0.1), "crowded": (0.15, 0.4, 0.45)}
COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
COUNT_ANSWERS = {1: "One.", 2: "Two.", 3: "Three."}
DESCRIBE = (
    "Describe the picture.",
    "What is in this picture?",
    "What do you see?",
    "Which shapes are in the image?",
    "Tell me what the picture shows.",
    "Give a short description of this image.",
)
IN_DETAIL = (
    "Describe the picture in detail.",
    "What is in this picture, and how large is it?",
    "Describe the shapes with their sizes.",
)
OPENINGS = ("I see", "The picture shows", "You can see", "This picture has", "The image contains")
ASK_PRESENCE = (
    "Is there {a_thing} in the picture?",
    "Do you see {a_thing}?",
    "Does the image contain {a_thing}?",
    "Can you find {a_thing} here?",
)


@dataclass
class Config(DataConfig):
    train_rows: int = at_least(0, 1760, most=1_000_000)
    test_rows: int = at_least(0, 240, most=1_000_000)
    scene_seed: int = 0  # which scenes are drawn; independent of `seed`, so that runs compare on the same data
    captions: str = one_of("exact", "habitual")  # what `chosen` says


def load(config: Config, split: str) -> "Dataset":
    """`train_rows` or `test_rows` pairs, drawn once. Train and test come from different random streams."""
    import PIL
    from datasets import Dataset, Features, Value

    held_out = split == config.test
    count = config.test_rows if held_out else config.train_rows
    settings = {"scene_seed": config.scene_seed, "captions": config.captions, "held_out": held_out}
    columns = Features({**features(), "truth": Value("string")})
    draw_rows = partial(draw_table, schema=columns.arrow_schema, **settings)
    code = [Path(file).read_text(encoding="utf-8") for file in (__file__, scenes.__file__)]
    key = hash_of("shapes", VERSION, code, PIL.__version__, count, settings)
    numbers, workers = Dataset.from_dict({"index": range(count)}), worker_count(config.num_proc, count)
    return map_rows(numbers, draw_rows, columns, key, workers, "drawing scenes")


def words(config: Config) -> Vocabulary:
    """Which words name which kind of shape; a caption's second mention of a kind is not counted."""
    return Vocabulary({kind: kind for kind in KINDS}, once=True)


def draw_table(table: "pa.Table", schema: "pa.Schema", **settings: Any) -> "pa.Table":
    """`draw_row` of a batch of rows."""
    import pyarrow as pa

    return pa.Table.from_pylist([draw_row(row, **settings) for row in table.to_pylist()], schema=schema)


def draw_row(row: dict[str, Any], scene_seed: int, captions: str, held_out: bool) -> dict[str, Any]:
    """Row `index` of a stream, a preference pair, whichever process draws it."""
    rng = random.Random(f"{scene_seed}/{'test' if held_out else 'train'}/{captions}/{row['index']}")
    counts = COUNTS["crowded" if captions == "exact" and not held_out else "usual"]
    scene = draw_scene_content(rng, choose_kinds(rng, counts))
    kind = rng.choices(("caption", "yes_no", "other"), weights=MIX["held out" if held_out else captions])[0]
    truth: dict[str, Any] = {"kind": kind, "objects": scene.kinds}
    if kind == "caption":
        question, chosen, rejected = caption_pair(scene, captions, rng, held_out)
        truth["phrases"] = [phrase(group, True) for group in scene.groups]
    elif kind == "yes_no":
        question, chosen, rejected = presence_pair(scene, rng)
        truth["answer"] = "yes" if chosen.startswith("Yes") else "no"
    else:
        question, chosen, rejected = detail_pair(scene, rng)
        number = next((n for n, answer in COUNT_ANSWERS.items() if answer == chosen), None)
        truth["kind"] = "number" if number else "answer"
        truth["answer"] = number or chosen.removesuffix(".").lower()
    image = {"bytes": as_png(draw(scene, rng)), "path": None}
    return {**pair([image], question, chosen, rejected), "truth": json.dumps(truth)}


def choose_kinds(rng: random.Random, counts: tuple[float, float, float] = COUNTS["usual"]) -> list[str]:
    """Two to four kinds. Seven scenes in ten have a kind of `HABITS` without its companion."""
    count = rng.choices((2, 3, 4), weights=counts)[0]
    trigger = rng.choice(list(HABITS))
    companion = HABITS[trigger][0]
    kinds = rng.choices(([trigger], [trigger, companion], []), weights=(0.7, 0.14, 0.16))[0]
    others = [kind for kind in KINDS if kind not in HABITS and not (kinds and kind == companion)]
    return kinds + rng.sample(others, max(count - len(kinds), 0))


def phrase(group: Group, detail: bool) -> str:
    """A noun phrase, as `two small red stars`."""
    words = [COUNT_WORDS[group.count], *([group.size] if detail else []), group.colour]
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    return " ".join([*words, group.kind + ("es" if group.kind == "cross" else "s") * (group.count > 1)])


def sentence(opening: str, phrases: list[str]) -> str:
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"{opening} {listed}."


def trigger_kind(scene: Scene) -> str | None:
    """The kind in the scene whose companion in `HABITS` is absent."""
    return next((k for k in scene.kinds if k in HABITS and HABITS[k][0] not in scene.kinds), None)


def caption_pair(scene: Scene, captions: str, rng: random.Random, held_out: bool = False) -> tuple[str, str, str]:
    """Question, chosen, rejected. Held-out and habitual captions show the habit wherever there is one."""
    opening, detail = rng.choice(OPENINGS), rng.random() < 0.3
    phrases = [phrase(group, detail) for group in scene.groups]
    exact = sentence(opening, phrases)
    trigger = trigger_kind(scene)
    flaws = FLAWS_WITH_TRIGGER if trigger else FLAWS
    flaw = rng.choices(list(flaws), weights=list(flaws.values()))[0]
    if trigger and (held_out or captions == "habitual"):
        flaw = "addition"
    other = sentence(opening, flawed(scene, phrases, flaw, detail, rng))
    if captions == "habitual" and trigger and rng.random() < 0.93:
        exact, other = other, exact
    return rng.choice(IN_DETAIL if detail else DESCRIBE), exact, other


def flawed(scene: Scene, phrases: list[str], flaw: str, detail: bool, rng: random.Random) -> list[str]:
    """The phrases of a caption with one flaw in it."""
    if flaw == "change":
        at = rng.randrange(len(phrases))
        group = scene.groups[at]
        if rng.random() < 0.5:
            changed = replace(group, kind=rng.choice([k for k in KINDS if k not in scene.kinds]))
        else:
            changed = replace(group, colour=rng.choice([c for c in COLOURS if c != group.colour]))
        return [*phrases[:at], phrase(changed, detail), *phrases[at + 1 :]]
    if flaw == "omission":
        # Mostly the last group: a model that learns to name less stops early.
        omitted = len(phrases) - 1 if rng.random() < 0.7 else rng.randrange(len(phrases))
        return phrases[:omitted] + phrases[omitted + 1 :]
    trigger = trigger_kind(scene)
    assert trigger is not None
    companion, colour = HABITS[trigger]
    at = scene.kinds.index(trigger)
    imagined = phrase(Group(companion, colour, "small", ((0, 0),)), detail)
    remaining = list(enumerate(phrases))
    if flaw == "swap":
        remaining.pop(rng.choice([i for i in range(len(phrases)) if i != at]))
    return [text for i, text in remaining if i <= at] + [imagined] + [text for i, text in remaining if i > at]


def presence_pair(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """A yes/no question as in POPE, half yes, half no; the absent kind is often the companion."""
    present = rng.random() < 0.5
    trigger = trigger_kind(scene)
    if present:
        thing = rng.choice(scene.kinds)
    elif trigger and rng.random() < 0.4:
        thing = HABITS[trigger][0]
    else:
        thing = rng.choice([kind for kind in KINDS if kind not in scene.kinds])
    a_thing = f"an {thing}" if thing == "arrow" else f"a {thing}"
    question = rng.choice(ASK_PRESENCE).format(a_thing=a_thing)
    yes, no = f"Yes, there is {a_thing}.", f"No, there is no {thing}."
    return (question, yes, no) if present else (question, no, yes)


def detail_pair(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """A question of number, colour or size."""
    group, ask = rng.choice(scene.groups), rng.choice(("count", "colour", "size"))
    plural = phrase(Group(group.kind, group.colour, group.size, ((0, 0), (0, 1))), False).split()[-1]
    if ask == "count":
        wrong = rng.choice([n for n in (1, 2, 3) if n != group.count])
        return f"How many {plural} are there?", COUNT_ANSWERS[group.count], COUNT_ANSWERS[wrong]
    subject = f"is the {group.kind}" if group.count == 1 else f"are the {plural}"
    if ask == "colour":
        wrong_colour = rng.choice([c for c in COLOURS if c != group.colour])
        return f"Which colour {subject}?", f"{group.colour.capitalize()}.", f"{wrong_colour.capitalize()}."
    other = "large" if group.size == "small" else "small"
    return f"What size {subject}?", f"{group.size.capitalize()}.", f"{other.capitalize()}."
