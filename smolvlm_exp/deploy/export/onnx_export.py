"""An ONNX export in the requested precisions, quantised by ONNX Runtime's own tools.

int8: matrix products in integers, weights with a scale per column, activations quantised dynamically; an embedding
table has one scale. int4: weights only, a scale per block of 32 (MatMulNBits, GatherBlockQuantized).
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from smolvlm_exp.deploy.export.onnx_graphs import MAX_FILE_BYTES, export_graphs, quiet
from smolvlm_exp.deploy.options import SUFFIXES
from smolvlm_exp.utils.files import read_json, write_json
from smolvlm_exp.utils.progress import track


class Graphs:
    """A folder with the three graphs in float32, and in other precisions as they are requested."""

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
        """These parts' graphs and external weights, quantised where they are missing."""
        files = []
        for part, precision in track(precisions.items(), "graphs in their precisions", len(precisions)):
            file = self.folder / "onnx" / f"{part}{SUFFIXES[precision]}.onnx"
            if not file.is_file():
                quantize(self.folder / "onnx" / f"{part}.onnx", file, precision)
            files += [file, *file.parent.glob(f"{file.name}_data")]
        return files

    def size(self, precisions: dict[str, str]) -> int:
        """Of these parts, in bytes."""
        return sum(file.stat().st_size for file in self.files(precisions))

    def copy_to(self, target: Path, precisions: dict[str, str]) -> None:
        """Copy the configuration, and the graphs in these precisions only."""
        (target / "onnx").mkdir()
        for file in (*self.folder.glob("*.*"), *self.files(precisions)):
            shutil.copy(file, target / file.relative_to(self.folder))


def quantize(source: Path, target: Path, precision: str) -> None:
    """Write the float32 graph in `source` to `target`, in `precision`: int8 or int4."""
    import onnx

    model = onnx.load(source)
    del model.graph.value_info[:]  # inferred for float32: the tools would trust it
    with quiet():
        quantized = to_int8(model) if precision == "int8" else to_int4(model)
    large = quantized.ByteSize() > MAX_FILE_BYTES
    onnx.save(quantized, target, save_as_external_data=large, location=f"{target.name}_data" if large else None)


def to_int8(model: Any) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    is_embedding = not any(node.op_type == "MatMul" for node in model.graph.node)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantized.onnx"
        quantize_dynamic(
            model,
            file,
            op_types_to_quantize=["Gather" if is_embedding else "MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=model.ByteSize() > MAX_FILE_BYTES,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # fused operators have no type information
        )
        return onnx.load(file)


def to_int4(model: Any) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        model,
        bits=4,
        block_size=32,  # weights that share a scale
        is_symmetric=True,
        accuracy_level=4,  # products in int8
        op_types_to_quantize=("MatMul", "Gather"),
    )
    quantizer.process()
    return quantizer.model.model
