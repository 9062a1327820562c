"""Fused layers against transformers' and PEFT's own, forward and backward, with every activation checkpointing."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model

from smolvlm_exp.engine.inputs.packing import pack_answers
from smolvlm_exp.engine.layers import linear, quantized_weights
from smolvlm_exp.engine.layers.attention import use_shared_prefix
from smolvlm_exp.engine.layers.dora import use_exact_dora
from smolvlm_exp.engine.layers.fuse import FusedTextLayer, FusedVisionLayer, fuse_layers, patch_product
from smolvlm_exp.engine.layers.layout import Layout
from smolvlm_exp.engine.layers.linear import FrozenLinears
from smolvlm_exp.engine.layers.quantized_weights import frozen_weight
from smolvlm_exp.engine.memory.footprint import LEVELS
from tests.engine.stock import IMAGE, SIDE, random_row, tiny_model

TEXT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def adapted(model, targets, dora=True, **more):
    """With an adapter that has moved in every tensor."""
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, use_dora=dora, target_modules=targets, **more))
    use_exact_dora(tuned)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    return tuned


def text_model(key_heads=2):
    model = tiny_model(kv_heads=key_heads).model.text_model
    use_shared_prefix(model)
    return model


def vision_model():
    model = tiny_model().model.vision_model
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def run(model):
    """Inputs that get a gradient, and the model's result: packed pairs for a text model, tiles for a vision tower."""
    if hasattr(model, "encoder"):
        pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        return pixels, model(pixel_values=pixels).last_hidden_state
    rows = [random_row(*words, []) for words in ((5, 3, 4), (7, 1, 2), (4, 6, 1))]
    groups = [[row["chosen_ids"], row["rejected_ids"], row["rejected_ids"][:1]][: 1 + i] for i, row in enumerate(rows)]
    packed = pack_answers([row["prompt_ids"] for row in rows], groups, [[0] * len(own) for own in groups], IMAGE)
    embeddings = model.embed_tokens(packed["ids"]).detach().requires_grad_()
    return embeddings, model(
        inputs_embeds=embeddings,
        position_ids=packed["positions"],
        attention_mask=embeddings.new_empty(1, 1, 0, 0),
        use_cache=False,
        layout=Layout.of(packed),
    ).last_hidden_state


def outcome(model, tuned):
    """The result and the gradients of the inputs and of the adapter, by name."""
    tuned.zero_grad()
    inputs, result = run(model)
    torch.manual_seed(1)
    (result * torch.randn_like(result)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in tuned.named_parameters() if p.requires_grad}
    return {"result": result.detach(), "inputs": inputs.grad, **gradients}


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 3e-6 * value.norm(), name


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize(
    ("vision", "targets"),
    [
        (False, TEXT), (False, ["q_proj", "v_proj", "down_proj"]), (False, ["up_proj"]), (False, ["o_proj"]),
        (True, VISION), (True, VISION[:3]), (True, ["fc2"]), (True, ["out_proj", "fc1"]),
    ],
)  # fmt: skip
def test_fused_layers_compute_what_the_ordinary_ones_do(vision, targets, dora):
    model = vision_model() if vision else text_model()
    layers, kind = (model.encoder.layers, FusedVisionLayer) if vision else (model.layers, FusedTextLayer)
    tuned = adapted(model, targets, dora)
    expected = outcome(model, tuned)
    for checkpointing in LEVELS:
        assert fuse_layers(layers, kind, checkpointing) is None
        assert_near(outcome(model, tuned), expected)


@pytest.fixture
def fused():
    """A text model and its adapter, fused."""
    model = text_model(key_heads=4)
    tuned = adapted(model, TEXT)
    fuse_layers(model.layers, FusedTextLayer, "full")
    return model, tuned


def test_a_disabled_adapter_has_no_effect(fused):
    model, tuned = fused
    with torch.no_grad():
        _, on = run(model)
        with tuned.disable_adapter():
            _, off = run(model)
        tuned.unload()
        _, base = run(model)
    assert not torch.allclose(on, base)
    assert torch.allclose(off, base, atol=1e-6)


def test_what_is_derived_from_an_adapter_follows_an_optimiser_step(fused):
    model, tuned = fused
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    outcome(model, tuned)
    optimiser.step()
    _, found = run(model)
    for layer in model.layers:
        layer.forward = layer.forward.ordinary
    _, expected = run(model)
    assert_near({"result": found}, {"result": expected})


def test_a_copied_model_computes_with_its_own_weights(fused):
    other = copy.deepcopy(fused[1])
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not run(other.get_base_model())[1].any()


def four_bits(seed):
    """A small frozen layer in nf4."""
    layer = bnb.nn.Linear4bit(32, 16, bias=False, quant_type="nf4")
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    return layer.requires_grad_(False)


@pytest.mark.parametrize("kept", [linear.KEPT, 0], ids=["small", "large"])
def test_a_cpu_unpacks_small_layers_once_and_anew_when_they_change(monkeypatch, kept):
    layers, x, unpacked = [four_bits(0), four_bits(1)], torch.randn(5, 32), []
    frozen = FrozenLinears(layers)
    unpack = quantized_weights.unpack_4bit
    monkeypatch.setattr(quantized_weights, "unpack_4bit", lambda *args: unpacked.append(args) or unpack(*args))
    for _ in range(3):
        result, _ = frozen.product(torch.float32).forward(x)
    assert len(unpacked) == 2
    assert torch.equal(result, x @ torch.cat([frozen_weight(layer) for layer in layers]).T)
    layers[1].weight = four_bits(2).weight
    monkeypatch.setattr(linear, "KEPT", kept)
    result, _ = frozen.product(torch.float32).forward(x)
    assert torch.equal(result, x @ torch.cat([frozen_weight(layer) for layer in layers]).T)


def test_without_a_layout_nothing_changes():
    model, ids = text_model(), torch.randint(9, 40, (2, 7))
    before = model(input_ids=ids).last_hidden_state
    fuse_layers(model.layers, FusedTextLayer, "none")
    assert torch.equal(model(input_ids=ids).last_hidden_state, before)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"lora_dropout": 0.1}, "has dropout"),
        ({"bias": "lora_only", "lora_bias": True}, "has a bias"),
        (None, "itself is trained"),
    ],
)
@pytest.mark.parametrize("kind", [FusedTextLayer, FusedVisionLayer])
def test_the_reason_for_not_fusing_is_given(kind, more, reason):
    model = text_model() if kind is FusedTextLayer else vision_model()
    if more:
        adapted(model, ["q_proj"], dora=False, **more)
    layers = model.layers if kind is FusedTextLayer else model.encoder.layers
    fuse_layers(layers, kind, "none", trains=False)
    assert isinstance(layers[0].forward, kind) == (reason != "has a bias")  # the others matter in training alone
    assert reason in fuse_layers(layers, kind, "none")
    assert not isinstance(layers[0].forward, kind)


@pytest.mark.parametrize(("side", "patch"), [(32, 8), (31, 7)])  # 31: three pixels are left over, and rows are padded
def test_the_patch_product_equals_the_convolution(side, patch):
    convolution = torch.nn.Conv2d(3, 24, patch, patch, padding="valid")
    pixels, upstream = torch.randn(5, 3, side, side), torch.randn(5, 24, side // patch, side // patch)
    expected, found = convolution(pixels), patch_product(convolution, pixels)
    gradients = [torch.autograd.grad(result, list(convolution.parameters()), upstream) for result in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_tiles_patches_do_not_depend_on_the_other_tiles():
    convolution = torch.nn.Conv2d(3, 1152, 14, 14, padding="valid").cuda().bfloat16()
    pixels = torch.randn(208, 3, 384, 384, device="cuda").bfloat16()
    whole = patch_product(convolution, pixels)
    for tiles in (1, 13, 52, 104):
        assert torch.equal(patch_product(convolution, pixels[:tiles]), whole[:tiles])
