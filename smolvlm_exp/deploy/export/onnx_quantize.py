"""An ONNX graph in 8 or 4 bits, by ONNX Runtime's own tools.

int8: products compute in integers, weights with a scale a column, activations quantised as they come; an embedding's
table has one scale. int4: weights alone, a scale for every 32 of them (MatMulNBits, GatherBlockQuantized).
"""

import tempfile
from pathlib import Path
from typing import Any

from smolvlm_exp.deploy.export.onnx_graphs import LARGEST, quiet

BLOCK = 32  # weights that share a scale in blocks
ALIKE = 4  # MatMulNBits' accuracy level: products in int8


def quantize(source: Path, target: Path, precision: str) -> None:
    """Write the float32 graph in `source` to `target`, in `precision`: int8 or int4."""
    import onnx

    model = onnx.load(source)
    del model.graph.value_info[:]  # what was inferred for float32: the tools would trust it
    embeds = not any(node.op_type == "MatMul" for node in model.graph.node)
    with quiet():
        made = in_integers(model, "Gather" if embeds else "MatMul") if precision == "int8" else in_blocks(model)
    large = made.ByteSize() > LARGEST
    onnx.save(made, target, save_as_external_data=large, location=f"{target.name}_data" if large else None)


def in_integers(model: Any, operator: str) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantized.onnx"
        large = model.ByteSize() > LARGEST
        quantize_dynamic(
            model,
            file,
            op_types_to_quantize=[operator],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # fused operators tell no types
        )
        return onnx.load(file)


def in_blocks(model: Any) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(
        model,
        bits=4,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=ALIKE,
        op_types_to_quantize=("MatMul", "Gather"),
    )
    made.process()
    return made.model.model
