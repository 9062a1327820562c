"""ops.py and quantized_weights.py in Triton: one pass over memory for what lies between two matrix products.

Importing this fails where there is no Triton, and the torch code there serves. Rows are a token's; a matrix may be a
part of a wider one, so each kernel takes the distance between rows beside the pointer. Sums are float32.
"""

from smolvlm_exp.engine.layers.kernels.activations import gelu, gelu_backward, swiglu, swiglu_backward
from smolvlm_exp.engine.layers.kernels.nf4 import unpack_4bit, unpacks
from smolvlm_exp.engine.layers.kernels.norms import norm, norm_backward
from smolvlm_exp.engine.layers.kernels.rotary import rotary, rotary_backward
from smolvlm_exp.engine.layers.kernels.scaling import affine, scale_backward_parts

__all__ = [
    "affine", "gelu", "gelu_backward", "norm", "norm_backward", "rotary", "rotary_backward", "scale_backward_parts",
    "swiglu", "swiglu_backward", "unpack_4bit", "unpacks",
]  # fmt: skip
