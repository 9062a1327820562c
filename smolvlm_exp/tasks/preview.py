"""task=preview: the first training rows as the model reads them, in the terminal and on a page. Loads no model.

python -m smolvlm_exp task=preview data=files data.folder=my_pairs
"""

from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.preferences import load_rows, prepare, separate
from smolvlm_exp.data.truth import truth_text
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.models.model import load_processor
from smolvlm_exp.reporting.preview_page import PreviewedRow, Side, preview_page
from smolvlm_exp.runs.find import choices
from smolvlm_exp.utils.files import write_text
from smolvlm_exp.utils.formatting import printable
from smolvlm_exp.utils.paths import relative_to_cwd


def preview(config: Config, folder: Path) -> list[PreviewedRow]:
    """Show the first `task.rows` rows of `data.train`, bad ones with what is wrong with them; write report.html.

    Raises:
        RequestError: the rows cannot be read.
    """
    processor, algorithm = load_processor(config.model), config.trainer.algorithm
    needed = {"answers": not config.trainer.samples_answers, "rejected": config.trainer.needs_rejected}
    found = load_rows(config.data, "train", **needed)
    prepared = prepare(found.select(range(min(config.task.rows, len(found)))), processor, config.data)
    good, bad = separate(prepared)
    dataset = PackedDataset(good, processor)
    shown = [previewed(row, dataset, i, processor, algorithm) for i, row in enumerate(good)]
    totals = summary_line(shown, len(found), algorithm)
    for row in shown:
        print(printable(row.as_text()), end="\n\n")
    problems = [f"row {row['row']}{' (' + row['from'] + ')' if 'from' in row else ''}: {row['reason']}" for row in bad]
    for problem in problems:
        print(printable(f"bad {problem}"))
    print(totals)
    write_text(folder / "report.html", preview_page(choices(folder), totals, shown, problems))
    print(f"{relative_to_cwd(folder)}/report.html")
    return shown


def previewed(row: dict[str, Any], dataset: PackedDataset, i: int, processor: Any, algorithm: str) -> PreviewedRow:
    """One row; what is trained on is what the engine's own batch of it says."""
    tensors = (dataset.chosen_only() if algorithm == "sft" else dataset)[i]
    learned = [name for name in ("chosen", "rejected") if f"{name}_ids" in tensors and algorithm != "grpo"]
    sides = [Side("prompt", as_read(tensors["prompt_ids"], processor), len(tensors["prompt_ids"]))]
    for name in learned:
        sides.append(Side(name, as_read(tensors[f"{name}_ids"], processor), len(tensors[f"{name}_ids"])))
    trained = torch.cat([torch.empty(0, dtype=torch.int64), *(tensors[f"{name}_ids"] for name in learned)])
    return PreviewedRow(
        sizes=[image.size for image in row["images"]],
        grids=list(zip(row["tile_rows"], row["tile_columns"], strict=True)),
        tiles=tensors["tiles"],
        image_tokens=row["image_tokens"],
        sides=sides,
        cut=row["uncut_tokens"] - row["prompt_tokens"] - max(row["chosen_tokens"], row["rejected_tokens"]),
        trained=len(trained),
        trained_image_tokens=int((trained == processor.image_token_id).sum()),
        truth=truth_text(row["truth"]) if row.get("truth") else "",
    )


def as_read(ids: torch.Tensor, processor: Any) -> str:
    """Token ids as text, control tokens included; a run of image tokens as its number."""
    runs = groupby(ids.tolist(), key=lambda token: token == processor.image_token_id)
    parts = [(image, list(tokens)) for image, tokens in runs]
    return "".join(
        f"[{len(tokens)} image tokens]" if image else processor.tokenizer.decode(tokens) for image, tokens in parts
    )


def summary_line(shown: list[PreviewedRow], rows: int, algorithm: str) -> str:
    """How many of the shown rows' tokens are trained on, and how many of those stand for an image."""
    of = f"{len(shown)} of {rows:,} rows"
    if algorithm == "grpo":
        return f"{of}: trained on are the model's own answers to these prompts, in which image tokens are never sampled"
    read = sum(side.tokens for row in shown for side in row.sides)
    trained, image = (sum(getattr(row, name) for row in shown) for name in ("trained", "trained_image_tokens"))
    return f"{of}: trained on are {trained:,} of {read:,} tokens, the answers'; {image} of them are image tokens"
