"""A source's row -> a prepared one: images decoded and checked, texts tokenised, what is wrong with it named."""

import hashlib
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.images import ImageError, ImageLimits, prepare_image, read_image_bytes
from smolvlm_exp.data.messages import Message, text_of
from smolvlm_exp.data.tokens import control_pattern, control_tokens, escape_control_tokens, tokenize_rows
from smolvlm_exp.data.truth import TRUTH_COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

SIDES = ("prompt", "chosen", "rejected")
LISTS = ("tile_rows", "tile_columns", "token_ids")  # per image, per image, of all sides
# uncut_tokens: of the prompt and the longer answer, before they are cut to data.max_length
COUNTS = ("prompt_tokens", "image_tokens", "chosen_tokens", "rejected_tokens", "uncut_tokens")

Row = dict[str, Any]


def prepared_features(source: "Features") -> "Features":
    """The Arrow types of prepared rows, from those of their source."""
    from datasets import Features, Image, List, Value

    given = {name: kind for name, kind in source.items() if name != "problem"}
    facts = {"image_sha256": List(Value("binary")), "problem": Value("string")}
    lists, counts = dict.fromkeys(LISTS, List(Value("int32"))), dict.fromkeys(COUNTS, Value("int32"))
    return Features({**given, "images": List(Image()), **facts, **lists, **counts})


class RowPreparer:
    """A batch of a source's rows, images undecoded -> the same rows prepared; runs in any process."""

    def __init__(self, processor: Any, config: DataConfig, features: "Features") -> None:
        """`features`: `prepared_features` of the rows."""
        self.max_edge, self.limits = config.max_edge, ImageLimits.of(config)
        self.validate = RowValidator(processor, config.max_length, config.on_long_answer)
        self.schema = features.arrow_schema

    def __call__(self, table: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        images = table.column("images")
        rows: list[Row] = table.drop_columns("images").to_pylist()
        for i, row in enumerate(rows):  # one row's undecoded images at a time: each may have data.max_image_mib
            row["images"] = images[i].as_py()
            row |= prepare_row(row, self.max_edge, self.limits, self.validate.controls)
        for row, facts in zip(rows, self.validate.batch(rows), strict=True):
            row |= facts
        return pa.Table.from_pylist(rows, schema=self.schema)


def prepare_row(row: Row, max_edge: int, limits: ImageLimits, controls: list[str]) -> Row:
    """Prepare a row's images, unless its source has found a problem, and escape control tokens in its prompt.

    Returns:
        `images` (PNG bytes where a change was needed, else the given ones), `image_sha256` of those bytes, `sizes`
        [[width, height], ...], `prompt`, `problem` (empty when fine).
    """
    images, hashes, sizes, problem = [], [], [], row.get("problem") or ""
    for number, entry in enumerate([] if problem else row["images"] or [], start=1):
        try:
            data, size = prepare_image(read_image_bytes(entry, limits), max_edge, limits)
        except ImageError as error:
            problem = f"image {number} {error}"
            break
        images.append({"bytes": data, "path": None})
        hashes.append(hashlib.sha256(data).digest())
        sizes.append(list(size))
    if problem:
        images, hashes, sizes = [], [], []
    prompt = escape_control_tokens(row["prompt"] or [], controls)
    return {"images": images, "image_sha256": hashes, "sizes": sizes, "prompt": prompt, "problem": problem}


class RowValidator:
    """What is wrong with prepared rows, if anything; their images' tiles; their token ids and the counts of them."""

    def __init__(self, processor: Any, max_length: int | None, on_long_answer: str) -> None:
        self.processor, self.controls = processor, control_tokens(processor)
        self.max_length, self.on_long_answer = max_length, on_long_answer
        self.spans: dict[tuple[int, int], list[int]] = {}

    def __call__(self, row: Row) -> Row:
        """Of one row."""
        return self.batch([row])[0]

    def batch(self, rows: list[Row]) -> list[Row]:
        """`problem`, and the columns `LISTS` and `COUNTS`, of each row; all are tokenised in one call."""
        count_tiles = self.processor.image_processor.get_number_of_image_patches
        messages = [{side: row[side] for side in SIDES if side in row} for row in rows]
        problems = [
            row["problem"] or row_problem(sides, len(row["sizes"]), self.controls) or scored_by_nothing(row)
            for row, sides in zip(rows, messages, strict=True)
        ]
        good = [i for i, problem in enumerate(problems) if not problem]
        tiles = [[count_tiles(height, width)[1:] for width, height in rows[i]["sizes"]] for i in good]
        ids = tokenize_rows(self.processor, [messages[i] for i in good], tiles, self.spans)
        none: Row = {**{name: [] for name in LISTS}, **dict.fromkeys(COUNTS, 0)}
        facts = [{**none, "problem": problem} for problem in problems]
        for i, shapes, sides in zip(good, tiles, ids, strict=True):
            facts[i] = self.measure(shapes, sides)
        return facts

    def measure(self, tiles: list[tuple[int, int]], ids: dict[str, list[int]]) -> Row:
        """The facts of a row, and whether it is too long."""
        prompt, *answers = ids.values()
        longest, images = max(map(len, answers), default=0), prompt.count(self.processor.image_token_id)
        room, problem = None if self.max_length is None else self.max_length - len(prompt), ""
        if room is not None and room <= 0:
            problem = (
                f"the prompt alone is {len(prompt)} tokens ({images} of the image) and "
                f"data.max_length={self.max_length} leaves none for the answer"
            )
        elif room is not None and longest > room and self.on_long_answer == "report":
            problem = f"the longer answer runs {longest - room} tokens past data.max_length={self.max_length}"
        chosen, rejected = (ids.get(side, [])[:room] for side in ("chosen", "rejected"))
        read, limit = len(prompt) + max(len(chosen), len(rejected)), self.processor.tokenizer.model_max_length
        if not problem and read > limit:
            problem = f"it is {read:,} tokens, and the model reads {limit:,}: shorten it" + (
                f", or cut its answers with data.max_length={limit}" if len(prompt) < limit else ""
            )
        if self.processor.image_token_id in (*chosen, *rejected):
            problem = "an answer has an image token in it, which no answer may be trained to hold"
        return {
            "problem": problem,
            "tile_rows": [rows for rows, _ in tiles],
            "tile_columns": [columns for _, columns in tiles],
            "token_ids": [*prompt, *chosen, *rejected],
            "prompt_tokens": len(prompt),
            "image_tokens": images,
            "chosen_tokens": len(chosen),
            "rejected_tokens": len(rejected),
            "uncut_tokens": len(prompt) + longest,
        }


def scored_by_nothing(row: Row) -> str:
    """The problem of a row that has neither answers nor a truth; empty where it has."""
    if "chosen" in row or row.get("truth"):
        return ""
    return f"it has nothing to score an answer by: {', '.join(f'`{name}`' for name in TRUTH_COLUMNS)} are empty"


def row_problem(messages: dict[str, list[Message]], images: int, controls: list[str]) -> str:
    """What is wrong with the messages of a row with this many images; empty when nothing is."""
    pattern = control_pattern(tuple(controls))
    for side, turns in messages.items():
        text = text_of(turns or [])
        if not text.strip():
            return f"`{side}` is empty"
        control = next((c for c in controls if c in text), None) if pattern.search(text) else None
        if control:
            return f"`{side}` contains {control}, which the model would read as a control token"
        if side != "prompt" and any(part["type"] == "image" for turn in turns for part in turn["content"]):
            return f"`{side}` has an image, or <image>, in it: an answer is text"
        roles = {turn["role"] for turn in turns}
        if side != "prompt" and roles != {"assistant"}:
            return f"`{side}` has the role {' and '.join(sorted(roles))}: an answer's role is assistant"
    prompt = messages["prompt"]
    if prompt[-1]["role"] != "user":
        return f"`prompt` ends with a turn of the {prompt[-1]['role']}; the last turn must be the user's"
    if not images:
        return "it has no image"
    placeholders = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    if placeholders != images:
        return f"it has {images} images but its prompt names {placeholders}"
    if "rejected" in messages and text_of(messages["chosen"]).strip() == text_of(messages["rejected"]).strip():
        return "`chosen` and `rejected` are the same"
    return ""
