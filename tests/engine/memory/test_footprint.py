"""The planner's formulas against what the fused layers allocate, counted tensor by tensor on a CPU.

A GPU's peaks are in test_planner.py; these tests notice when the layers begin to save something else.
"""

import weakref

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smolvlm_exp.engine.forward import add_packed_forward
from smolvlm_exp.engine.inputs.packing import collate
from smolvlm_exp.engine.layers.fuse import fuse
from smolvlm_exp.engine.memory.footprint import LEVELS, RowSizes, peak
from smolvlm_exp.models.adapter import AdapterConfig, lora_config, matched_modules
from smolvlm_exp.models.model import load_model
from smolvlm_exp.models.shape import shape_from
from smolvlm_exp.training.memory_spec import AdapterSpec, memory_spec
from tests.conftest import compose

PAIRS, PROMPT, ANSWERS, TILES = 8, 90, (15, 11), 3


class Allocated(TorchDispatchMode):
    """The most bytes that the tensors created within took at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key):
        self.now -= self.sizes.pop(key, 0)


@pytest.fixture(scope="module", params=["text", "recipe"])
def adapted(request):
    """A model with an adapter, and its MemorySpec."""
    model = load_model(compose().model)
    config = AdapterConfig(use_dora=True, target=request.param)
    adapter = AdapterSpec(matched_modules(model, request.param), config.r, dora=True, dropout=False)
    spec = memory_spec(shape_from(model.config), "whole", adapter, features=False, element=4, gpu=False)
    model = get_peft_model(model, lora_config(config, quantised=False))
    add_packed_forward(model.get_base_model(), lambda tiles: tiles.float(), ("log_probs",))
    return model, spec


@pytest.fixture(scope="module")
def batch():
    shape = compose().model.shape
    image = torch.full((TILES * shape.image_seq_len,), shape.image_token_id)
    row = {
        "prompt_ids": torch.cat((image, torch.full((PROMPT - len(image),), 5))),
        "chosen_ids": torch.full((ANSWERS[0],), 6),
        "rejected_ids": torch.full((ANSWERS[1],), 7),
        "tiles": torch.zeros(TILES, 3, shape.image_size, shape.image_size, dtype=torch.uint8),
    }
    return collate([row] * PAIRS, 2, shape.image_token_id)


@pytest.mark.parametrize("checkpointing", LEVELS)
def test_a_pass_allocates_what_the_formula_says(adapted, batch, checkpointing):
    model, spec = adapted
    fuse(model, checkpointing, checkpointing)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    for _ in range(2):  # the first derives what all others use
        model.zero_grad()
        with Allocated() as counted:
            model(packed=batch["packed"], labels=labels).log_probs.sum().backward()
    load = RowSizes([(PROMPT, *ANSWERS, TILES)] * PAIRS).longest(PAIRS)
    assert peak(spec, load, checkpointing, checkpointing) == pytest.approx(counted.most, rel=0.2)
