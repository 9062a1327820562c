"""What this machine's GPU can do. `SMOLVLM_EXP_WITHOUT=bf16,flash,triton` makes it an older one, for trying its path.

|            | from                          | otherwise                                                       |
|------------|-------------------------------|-----------------------------------------------------------------|
| bf16       | Ampere (RTX 30, A10)          | float16, the loss scaled                                        |
| flash      | Ampere                        | torch's memory-efficient attention                              |
| triton     | Ampere, where it is installed | torch code: several passes over memory where a kernel needs one |
"""

import os
from functools import cache

from smolvlm_exp.utils.errors import RequestError

PARTS = ("bf16", "flash", "triton")
WITHOUT = "SMOLVLM_EXP_WITHOUT"
AMPERE = (8, 0)  # compute capability


@cache
def has(part: str) -> bool:
    """Whether the current GPU has a part of the table above; False without a GPU.

    Raises:
        RequestError: the environment variable names something else.
    """
    import torch

    without = os.environ.get(WITHOUT, "")
    if not set(without.replace(",", " ").split()) <= set(PARTS):
        raise RequestError(f"{WITHOUT}={without}: it may name {', '.join(PARTS)}, with commas between.")
    if part in without or not torch.cuda.is_available():
        return False
    if part == "bf16":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cuda.get_device_capability() >= AMPERE
