"""Fused layers against transformers' and PEFT's own, forward and backward, whatever they keep."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaModel
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from smolvlm_exp.engine.inputs import packing
from smolvlm_exp.engine.layers import shared_prefix_attention as attention
from smolvlm_exp.engine.layers.dora import use_exact_dora
from smolvlm_exp.engine.layers.fuse import fuse_layers
from smolvlm_exp.engine.layers.text_layer import FusedTextLayer
from smolvlm_exp.engine.layers.vision_layer import FusedVisionLayer, patch_product
from smolvlm_exp.engine.memory.footprint import LEVELS

TEXT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def adapted(model, targets, dora, **more):
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
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=key_heads, vocab_size=50, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaModel(config)
    attention.use_shared_prefix(model)
    return model


def vision_model():
    config = Idefics3VisionConfig(
        hidden_size=48, num_hidden_layers=2, intermediate_size=80, num_attention_heads=4, image_size=32, patch_size=8,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = Idefics3VisionTransformer(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def packed_rows():
    rows = []
    for prompt, chosen, rejected in ((5, 3, 4), (7, 1, 2), (4, 6, 1)):
        sides = [torch.randint(3, 49, (n,)) for n in (prompt, chosen, rejected)]
        row = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), sides, strict=True))
        rows.append({**row, "tiles": torch.zeros(0, 3, 4, 4, dtype=torch.uint8)})
    return packing.pack(rows, image_token_id=49)


def text_pass(model, tuned, packed):
    embeddings = model.embed_tokens(packed["ids"]).detach().requires_grad_()
    return embeddings, model(
        inputs_embeds=embeddings,
        position_ids=packed["positions"],
        attention_mask=embeddings.new_empty(1, 1, 0, 0),
        use_cache=False,
        layout=attention.Layout.of(packed),
    ).last_hidden_state


def gradients(tuned, result):
    tuned.zero_grad()
    torch.manual_seed(1)
    (result * torch.randn_like(result)).sum().backward()
    return {name: p.grad.clone() for name, p in tuned.named_parameters() if p.requires_grad}


def assert_near(found, expected, bound=3e-6):
    for name, value in expected.items():
        assert (found[name] - value).norm() <= bound * value.norm(), name


@pytest.mark.parametrize("checkpointing", LEVELS)
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("targets", [TEXT, ["q_proj", "v_proj", "down_proj"], ["up_proj"], ["o_proj"]], ids=len)
def test_decoder_layers(checkpointing, dora, targets):
    torch.manual_seed(0)
    model = text_model()
    tuned, packed = adapted(model, targets, dora), packed_rows()
    embeddings, result = text_pass(model, tuned, packed)
    expected, expected_input = gradients(tuned, result), embeddings.grad
    assert fuse_layers(model.layers, FusedTextLayer, checkpointing) is None
    embeddings, again = text_pass(model, tuned, packed)
    assert_near({"result": again}, {"result": result})
    assert_near(gradients(tuned, again), expected)
    assert_near({"input": embeddings.grad}, {"input": expected_input})


@pytest.mark.parametrize("checkpointing", LEVELS)
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("targets", [VISION, VISION[:3], ["fc2"], ["out_proj", "fc1"]], ids=len)
def test_encoder_layers(checkpointing, dora, targets):
    torch.manual_seed(0)
    model = vision_model()
    tuned, pixels = adapted(model, targets, dora), torch.randn(3, 3, 32, 32)
    result = model(pixel_values=pixels).last_hidden_state
    expected = gradients(tuned, result)
    assert fuse_layers(model.encoder.layers, FusedVisionLayer, checkpointing) is None
    again = model(pixel_values=pixels).last_hidden_state
    assert_near({"result": again}, {"result": result})
    assert_near(gradients(tuned, again), expected)


def test_an_adapter_switched_off_is_off():
    torch.manual_seed(0)
    model = text_model(key_heads=4)
    tuned, packed = adapted(model, TEXT, True), packed_rows()
    fuse_layers(model.layers, FusedTextLayer, "none")
    with torch.no_grad():
        _, on = text_pass(model, tuned, packed)
        with tuned.disable_adapter():
            _, off = text_pass(model, tuned, packed)
        _, base = text_pass(model, tuned.unload(), packed)
    assert not torch.allclose(on, base)
    assert torch.allclose(off, base, atol=1e-6)


def test_an_optimiser_step_is_seen():
    """What is derived from the adapters must not outlive them."""
    torch.manual_seed(0)
    model = text_model()
    tuned, packed = adapted(model, TEXT, True), packed_rows()
    fuse_layers(model.layers, FusedTextLayer, "full")
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    gradients(tuned, text_pass(model, tuned, packed)[1])
    optimiser.step()
    _, found = text_pass(model, tuned, packed)
    for layer in model.layers:
        layer.forward = layer.forward.ordinary
    _, expected = text_pass(model, tuned, packed)
    assert_near({"result": found}, {"result": expected})


def test_a_copy_of_the_model_is_a_model_of_its_own():
    torch.manual_seed(0)
    model = text_model()
    tuned, packed = adapted(model, TEXT, True), packed_rows()
    fuse_layers(model.layers, FusedTextLayer, "none")
    other = copy.deepcopy(tuned)
    for parameter in other.parameters():
        parameter.data.zero_()
    _, result = text_pass(other.get_base_model(), other, packed)
    assert not result.any()


def test_without_a_layout_nothing_changes():
    torch.manual_seed(0)
    model = text_model()
    ids = torch.randint(0, 50, (2, 7))
    before = model(input_ids=ids).last_hidden_state
    fuse_layers(model.layers, FusedTextLayer, "none")
    assert torch.equal(model(input_ids=ids).last_hidden_state, before)


@pytest.mark.parametrize(
    ("more", "said"),
    [({"lora_dropout": 0.1}, "has dropout"), ({"bias": "lora_only", "lora_bias": True}, "has a bias")],
)
def test_what_a_fused_layer_does_not_do_is_told(more, said):
    model = text_model()
    adapted(model, TEXT, False, **more)
    assert said in fuse_layers(model.layers, FusedTextLayer, "none")
    assert not isinstance(model.layers[0].forward, FusedTextLayer)


def test_weights_that_train_are_told():
    model, tower = text_model(), vision_model()
    assert "itself is trained" in fuse_layers(model.layers, FusedTextLayer, "none")
    assert "itself is trained" in fuse_layers(tower.encoder.layers, FusedVisionLayer, "none")
    assert not isinstance(tower.encoder.layers[0].forward, FusedVisionLayer)


@pytest.mark.parametrize(("side", "patch"), [(32, 8), (31, 7)])  # 31: three pixels are left over, and rows are padded
def test_patches_are_the_convolutions(side, patch):
    convolution = torch.nn.Conv2d(3, 24, patch, patch, padding="valid")
    pixels, upstream = torch.randn(5, 3, side, side), torch.randn(5, 24, side // patch, side // patch)
    found = []
    for result in (convolution(pixels), patch_product(convolution, pixels)):
        found.append((result, *torch.autograd.grad(result, list(convolution.parameters()), upstream)))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_tiles_patches_are_the_same_beside_any_others():
    convolution = torch.nn.Conv2d(3, 1152, 14, 14, padding="valid").cuda().bfloat16()
    pixels = torch.randn(208, 3, 384, 384, device="cuda").bfloat16()
    whole = patch_product(convolution, pixels)
    for tiles in (1, 13, 52, 104):
        assert torch.equal(patch_product(convolution, pixels[:tiles]), whole[:tiles])
