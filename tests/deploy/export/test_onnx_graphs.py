"""The three ONNX graphs against PyTorch, through ONNX Runtime: numbers, names, sizes, and other clients."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from smolvlm_exp.data.messages import user
from smolvlm_exp.deploy.export import onnx_export, onnx_graphs
from smolvlm_exp.deploy.export.onnx_export import quantize
from smolvlm_exp.deploy.options import DECODER, EMBEDDING, PARTS, SUFFIXES, VISION
from smolvlm_exp.deploy.session.backends import OnnxModel, load_folder, runtime
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.evaluation.generate import generate_answers, left_padded
from smolvlm_exp.utils.files import read_json

QUESTIONS = ("What do you see?", "Is there a star in the picture?", "Describe the picture.", "How many moons?")


@pytest.fixture(scope="module")
def torch_model(small):
    return load_folder(small, None)[0].model


@pytest.fixture(scope="module")
def exported(graphs):
    return {precision: OnnxModel(graphs, dict.fromkeys(PARTS, precision)) for precision in SUFFIXES}


def make_rows(rows, count):
    """Rows with images of several sizes (so that batches have padding tiles), and one with two images."""
    made = []
    for number in range(count):
        image = rows.test[number % len(rows.test)]["images"][0]
        size = [(64, 64), (128, 64), (100, 128), (32, 32)][number % 4]
        images = [image.resize(size)] * (2 if number == 3 else 1)
        made.append({"images": images, "prompt": [user(QUESTIONS[number % 4], len(images))]})
    return made


def test_graph_after_graph(torch_model, tmp_path, monkeypatch, bars):
    written = []
    monkeypatch.setattr(onnx_graphs, "write_graph", lambda file, *args, **kwargs: written.append(file.stem))
    onnx_graphs.export_graphs(torch_model, tmp_path)
    assert written == [VISION, EMBEDDING, DECODER]
    assert bars == {"ONNX graphs": (3, 3)}


def test_logits_of_a_padded_batch(torch_model, exported, processor, rows):
    inputs = left_padded(processor, make_rows(rows, 4))
    assert (inputs["pixel_values"].flatten(2).abs().sum(2) == 0).any(), "no tile is padding"
    assert (inputs["attention_mask"] == 0).any()
    with torch.no_grad():
        expected = torch_model(**inputs).logits
    actual = exported["fp32"](**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (actual - expected)[real].abs().max() < 1e-4
    for precision, most in (("int8", 0.1), ("int4", 0.5)):
        off = (exported[precision](**inputs).logits - expected)[real].abs().max()
        assert 1e-3 < off < most * expected.abs().max(), (precision, off)


@pytest.mark.parametrize(("count", "tokens"), [(4, 24), pytest.param(50, 64, marks=pytest.mark.slow)])
def test_greedy_tokens_are_equal(torch_model, exported, processor, rows, count, tokens):
    made = make_rows(rows, count)
    for some in (made[:1], made):
        answers = [generate_answers(m, processor, some, Sampling(tokens)) for m in (torch_model, exported["fp32"])]
        assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_names_are_those_of_the_communitys_exports(graphs, exported, torch_model):
    def signature(part):
        model = onnx.load(graphs / "onnx" / f"{part}.onnx")
        return [[value.name for value in side] for side in (model.graph.input, model.graph.output)]

    layers = range(torch_model.config.text_config.num_hidden_layers)
    past = [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]
    assert signature(VISION) == [["pixel_values", "pixel_attention_mask"], ["image_features"]]
    assert signature(EMBEDDING) == [["input_ids"], ["inputs_embeds"]]
    assert signature(DECODER) == [
        ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in past)],
        ["logits", *(f"present.{name}" for name in past)],
    ]
    for name in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json"):
        assert (graphs / name).is_file(), name
    # Without these transformers.js makes no processor, and no prompt.
    assert read_json(graphs / "preprocessor_config.json")["processor_class"] == "Idefics3Processor"
    assert "<end_of_utterance>" in read_json(graphs / "tokenizer_config.json")["chat_template"]


def test_the_client_code_of_published_model_cards_works(graphs, torch_model, processor, rows):
    """Positions from 1, and after the prompt a mask of one token: as the loop on those cards passes them."""
    vision, embedding, decoder = (onnxruntime.InferenceSession(graphs / "onnx" / f"{part}.onnx") for part in PARTS)
    inputs = left_padded(processor, make_rows(rows, 1))
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    config = torch_model.config.text_config
    shape = (1, config.num_key_value_heads, 0, config.head_dim)
    names = [entry.name for entry in decoder.get_inputs() if entry.name.startswith("past_key_values.")]
    past = dict.fromkeys(names, np.zeros(shape, np.float32))
    positions, said = mask.cumsum(-1), []
    pixel_mask = inputs["pixel_attention_mask"].numpy().astype(np.bool_)
    pixels = {"pixel_values": inputs["pixel_values"].numpy(), "pixel_attention_mask": pixel_mask}
    features = vision.run(["image_features"], pixels)[0]
    for step in range(12):
        embeds = embedding.run(None, {"input_ids": ids})[0]
        if not step:
            embeds[ids == torch_model.config.image_token_id] = features.reshape(-1, features.shape[-1])
        fed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **past}
        logits, *present = decoder.run(None, fed)
        past = dict(zip(past, present, strict=True))
        ids = logits[:, -1].argmax(-1, keepdims=True)
        mask, positions = np.ones_like(ids), positions[:, -1:] + 1
        said.append(int(ids[0, 0]))
    expected = torch_model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)
    assert said == expected[0, inputs["input_ids"].shape[1] :].tolist()


def test_lower_precisions_are_smaller(graphs):
    def size(part, precision):
        return (graphs / "onnx" / f"{part}{SUFFIXES[precision]}.onnx").stat().st_size

    assert size(DECODER, "int8") < 0.5 * size(DECODER, "fp32")  # graphs are as large as weights here
    assert size(DECODER, "int4") < size(DECODER, "int8")
    assert size(EMBEDDING, "int4") < size(EMBEDDING, "int8") < 0.3 * size(EMBEDDING, "fp32")


def test_types_inferred_for_float32_do_not_mislead_quantisation(graphs, tmp_path):
    model = onnx.load(graphs / "onnx" / f"{DECODER}.onnx")
    products = {node.output[0] for node in model.graph.node if node.op_type == "MatMul"}
    inferred = [value for value in model.graph.value_info if value.name in products]
    assert inferred
    for value in inferred:
        value.type.tensor_type.elem_type = onnx.TensorProto.INT32  # wrong on purpose
    onnx.save(model, tmp_path / "misled.onnx")
    quantize(tmp_path / "misled.onnx", tmp_path / "int8.onnx", "int8")
    expected = onnx.load(graphs / "onnx" / f"{DECODER}_int8.onnx").graph
    actual = onnx.load(tmp_path / "int8.onnx").graph
    assert [node.op_type for node in actual.node] == [node.op_type for node in expected.node]
    onnxruntime.InferenceSession(tmp_path / "int8.onnx")


def test_integer_products_are_exact_on_every_processor(tmp_path):
    """Without VNNI, 255 * 127 + 255 * 127 is clamped to 32767 by default: half of what it should be."""
    weights = ", ".join(["1"] * 64 * 8)
    product = f"(float[rows, 64] x) => (float[rows, 8] y) <float[64, 8] w = {{{weights}}}> {{ y = MatMul(x, w) }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> product {product}')
    onnx.save(model, tmp_path / "product.onnx")
    quantize(tmp_path / "product.onnx", tmp_path / "int8.onnx", "int8")
    x = np.ones((3, 64), np.float32)
    assert np.allclose(runtime(tmp_path / "int8.onnx").run(None, {"x": x})[0], 64, rtol=0.01)


@pytest.mark.slow
def test_large_weights_are_in_a_file_of_their_own(tmp_path, monkeypatch, processor, rows, torch_model):
    for module in (onnx_graphs, onnx_export):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 100_000)
    made = onnx_export.Graphs(tmp_path / "work", torch_model, processor)
    inputs = left_padded(processor, make_rows(rows, 2))
    with torch.no_grad():
        expected = torch_model(**inputs).logits
    for precision in SUFFIXES:
        chosen = dict.fromkeys(PARTS, precision)
        (tmp_path / precision).mkdir()
        made.copy_to(tmp_path / precision, chosen)
        assert list((tmp_path / precision / "onnx").glob("*.onnx_data"))
        logits = OnnxModel(tmp_path / precision, chosen)(**inputs).logits
        assert (logits - expected)[inputs["attention_mask"].bool()].abs().max() < {"fp32": 1e-4}.get(precision, 20)
