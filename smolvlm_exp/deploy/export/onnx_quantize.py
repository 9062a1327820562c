"""An ONNX graph in 8 or 4 bits, by ONNX Runtime's own tools.

int8: matrix products in integers, weights with a scale per column, activations quantised dynamically; an embedding
table has one scale. int4: weights only, a scale per block of 32 (MatMulNBits, GatherBlockQuantized).
"""

import tempfile
from pathlib import Path
from typing import Any

from smolvlm_exp.deploy.export.onnx_graphs import MAX_FILE_BYTES, quiet

BLOCK_SIZE = 32  # weights that share a scale
ACCURACY_LEVEL = 4  # of MatMulNBits: products in int8


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
        block_size=BLOCK_SIZE,
        is_symmetric=True,
        accuracy_level=ACCURACY_LEVEL,
        op_types_to_quantize=("MatMul", "Gather"),
    )
    quantizer.process()
    return quantizer.model.model
