"""Exact DoRA (arXiv 2402.09353) at about LoRA's cost.

DoRA divides each row of W + s B A by its norm. Written out (eq. 5's norm, squared, a row):

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 diag(B (A A^T) B^T)

||W||^2 never changes and W A^T is a product with r columns, so W + s B A is never formed. Everything is float32, and a
fresh adapter's magnitude is taken from the same formula: magnitude / norm is then exactly 1, and the policy starts at
the reference in bfloat16 too.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from smolvlm_exp.engine.weights import frozen_weight


def squared_norm(
    base: torch.Tensor, weight_a: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """||W + s B A||^2 of each row.

    Args:
        base: (out,) ||W||^2; weight_a: (out, r) W A^T; a: (r, in); b: (out, r).

    Returns:
        (out,) float32.
    """
    a, b, weight_a = a.float(), b.float(), weight_a.float()
    cross = (weight_a * b).sum(1)
    own = ((b @ (a @ a.T)) * b).sum(1)
    return base + 2 * scaling * cross + scaling**2 * own


@torch.no_grad()
def start_at_reference(model: nn.Module) -> int:
    """Give every fresh DoRA layer (B is zero still) the magnitude that this module's formula finds for its base.

    Returns:
        How many layers that were.
    """
    fresh = 0
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name, magnitude in layer.lora_magnitude_vector.items():
            if not layer.lora_B[name].weight.any():
                magnitude.weight.data = row_norms(layer.get_base_layer()).sqrt()
                fresh += 1
    return fresh


def row_norms(base: nn.Module) -> torch.Tensor:
    """(out,) ||W||^2 in float32 of a frozen linear layer."""
    return torch.linalg.vector_norm(frozen_weight(base), dim=1, dtype=torch.float32).square()
