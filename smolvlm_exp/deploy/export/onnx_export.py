"""An ONNX export in the precision that was asked for, or in the smallest that the gate lets pass."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolvlm_exp.deploy.export.onnx_graphs import export_graphs
from smolvlm_exp.deploy.export.onnx_quantize import quantize
from smolvlm_exp.deploy.export.options import DECODER, EMBEDDING, SUFFIXES, VISION
from smolvlm_exp.utils.files import read_json, write_json

LARGEST_FIRST = (DECODER, VISION, EMBEDDING)  # of the smaller SmolVLMs; the order in which a search gives bits up
SMALLEST_FIRST = ("int4", "int8")


class Graphs:
    """A folder with the three graphs in float32, and in other precisions once they are asked for."""

    def __init__(self, folder: Path, model: Any, processor: Any) -> None:
        self.folder = folder
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        save_beside(folder, model, processor)
        export_graphs(model, folder / "onnx")

    def file(self, part: str, precision: str) -> Path:
        """The part's graph, made where it is not there yet."""
        file = self.folder / "onnx" / f"{part}{SUFFIXES[precision]}.onnx"
        if not file.is_file():
            quantize(self.file(part, "fp32"), file, precision)
        return file

    def size(self, precisions: dict[str, str]) -> int:
        """Bytes of the parts together."""
        return sum(each.stat().st_size for file in self.files(precisions) for each in with_data(file))

    def files(self, precisions: dict[str, str]) -> list[Path]:
        return [self.file(part, precision) for part, precision in precisions.items()]

    def place(self, target: Path, precisions: dict[str, str]) -> None:
        """All but the graphs in other precisions, into `target`."""
        (target / "onnx").mkdir()
        for file in self.folder.iterdir():
            if file.is_file():
                shutil.copy(file, target / file.name)
        for file in self.files(precisions):
            for each in with_data(file):
                shutil.copy(each, target / "onnx" / each.name)


def with_data(file: Path) -> list[Path]:
    """A graph's file, and that of its weights where they lie apart."""
    apart = file.with_name(f"{file.name}_data")
    return [file, apart] if apart.is_file() else [file]


def save_beside(folder: Path, model: Any, processor: Any) -> None:
    """What clients read beside the graphs: configuration, tokenizer, processor, chat template."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    # transformers.js looks for these two where transformers 4 wrote them, and stops without them.
    images = {**processor.image_processor.to_dict(), "processor_class": type(processor).__name__}
    write_json(folder / "preprocessor_config.json", images)
    words = {**read_json(folder / "tokenizer_config.json"), "chat_template": processor.chat_template}
    write_json(folder / "tokenizer_config.json", words)


def search(graphs: Graphs, holds: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    """The smallest precisions that hold, found a part at a time: at most two trials a part.

    Args:
        holds: whether a model with these precisions passes.
    """
    chosen = dict.fromkeys(LARGEST_FIRST, "fp32")
    for part in LARGEST_FIRST:
        sizes = {kind: graphs.size({part: kind}) for kind in (*SMALLEST_FIRST, "fp32")}
        for kind in SMALLEST_FIRST:
            tried = {**chosen, part: kind}
            if sizes[kind] < sizes["fp32"] and holds(tried):
                chosen = tried
                break
    return chosen
