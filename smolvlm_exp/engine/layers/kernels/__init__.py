"""ops.py and quantized_weights.py in Triton: one pass over memory for what lies between two matrix products.

Importing this fails where there is no Triton, and the torch code there serves. A row is a token's; a matrix may be part
of a wider one, so a kernel takes the distance between rows along with the pointer. Sums are float32.
"""

from smolvlm_exp.engine.layers.kernels.elementwise import activation, activation_backward, affine, scale_backward
from smolvlm_exp.engine.layers.kernels.nf4 import unpack_4bit, unpacks
from smolvlm_exp.engine.layers.kernels.norms import norm, norm_backward
from smolvlm_exp.engine.layers.kernels.rotary import rotary, rotary_backward

__all__ = [
    "activation", "activation_backward", "affine", "norm", "norm_backward", "rotary", "rotary_backward",
    "scale_backward", "unpack_4bit", "unpacks",
]  # fmt: skip
