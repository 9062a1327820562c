"""CUDA graphs: what a CPU can show of them. tests/engine/test_trainers.py holds replayed passes against the others."""

import pytest
import torch

from smolvlm_exp.engine.layers import fuse
from smolvlm_exp.engine.layers.fuse import TextStack, free_graphs, replaying, stack_of
from smolvlm_exp.engine.model_parts import core_of
from tests.engine.stock import tiny_adapter, tiny_model


@pytest.fixture
def core():
    model = tiny_adapter(tiny_model(), "text")
    assert fuse.fuse(model, "none", "none") == []
    return core_of(model)


def test_a_fused_text_model_has_one_stack(core):
    stack = stack_of(core)
    fuse.fuse(core, "full", "full")
    assert stack_of(core) is stack
    assert [layer.checkpointing for layer in stack.layers] == ["full", "full"]
    assert not stack.can_replay  # on a CPU
    assert not stack.hooked
    core.text_model.layers[0].register_forward_pre_hook(lambda *_: None)
    assert stack.hooked


def test_passes_are_replayed_where_asked_for_and_until_then(core):
    stack = stack_of(core)
    for wanted in (True, False):
        with replaying(core, wanted):
            assert stack.replays == wanted
        assert not stack.replays
    free_graphs(core)  # nothing to free


@pytest.mark.parametrize(("free", "room"), [(5_999, False), (6_000, True)])
def test_a_pass_needs_its_memory_twice(monkeypatch, free, room):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 4_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1_000)
    monkeypatch.setattr(fuse, "free_memory", lambda device: free)
    stack = TextStack([])
    assert stack.has_room(torch.device("cuda")) == room
    stack.graphs.passes["a shape"] = None
    assert stack.has_room(torch.device("cuda"))
