"""An ONNX export in the requested precisions, or in the smallest that pass the parity gate."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolvlm_exp.deploy.export.onnx_graphs import export_graphs
from smolvlm_exp.deploy.export.onnx_quantize import quantize
from smolvlm_exp.deploy.export.options import DECODER, EMBEDDING, SUFFIXES, VISION
from smolvlm_exp.utils.files import read_json, write_json

SEARCH_ORDER = (DECODER, VISION, EMBEDDING)  # the largest first, in the smaller SmolVLMs


class Graphs:
    """A folder with the three graphs in float32, and in other precisions once they are requested."""

    def __init__(self, folder: Path, model: Any, processor: Any) -> None:
        self.folder = folder
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        # transformers.js looks for these two where transformers 4 wrote them, and stops without them.
        images = {**processor.image_processor.to_dict(), "processor_class": type(processor).__name__}
        write_json(folder / "preprocessor_config.json", images)
        tokenizer = {**read_json(folder / "tokenizer_config.json"), "chat_template": processor.chat_template}
        write_json(folder / "tokenizer_config.json", tokenizer)
        export_graphs(model, folder / "onnx")

    def files(self, precisions: dict[str, str]) -> list[Path]:
        """Of these parts, with their external weights; quantised where they are not there yet."""
        files = []
        for part, precision in precisions.items():
            file = self.folder / "onnx" / f"{part}{SUFFIXES[precision]}.onnx"
            if not file.is_file():
                quantize(self.folder / "onnx" / f"{part}.onnx", file, precision)
            files += [file, *file.parent.glob(f"{file.name}_data")]
        return files

    def size(self, precisions: dict[str, str]) -> int:
        """Bytes of these parts."""
        return sum(file.stat().st_size for file in self.files(precisions))

    def copy_to(self, target: Path, precisions: dict[str, str]) -> None:
        """Copy the configuration, and the graphs in these precisions alone."""
        (target / "onnx").mkdir()
        for file in (*self.folder.glob("*.*"), *self.files(precisions)):
            shutil.copy(file, target / file.relative_to(self.folder))


def search(graphs: Graphs, passes: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    """The smallest precisions that pass the gate, part by part: at most two trials each."""
    chosen = dict.fromkeys(SEARCH_ORDER, "fp32")
    for part in SEARCH_ORDER:
        for precision in ("int4", "int8"):
            trial = {**chosen, part: precision}
            if graphs.size({part: precision}) < graphs.size({part: "fp32"}) and passes(trial):
                chosen = trial
                break
    return chosen
