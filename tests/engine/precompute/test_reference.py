"""Reference log-probabilities: right, computed once, and never those of something else."""

import json
import multiprocessing
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from smolvlm_exp.engine.disk_cache import DiskCache, cache_key
from smolvlm_exp.engine.fingerprint import content_hash, weights_key
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.precompute.reference import reference_logps, row_keys
from smolvlm_exp.evaluation.preference import answer_logps
from smolvlm_exp.models.model import load_model
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose
from tests.engine.inputs.test_dataset import PLENTY, encoded, make, noise, packed

PARTS = {"weights": "of the test", "dtype": "float32", "ld_alpha": None}


class Count:
    """A reference whose scores are the numbers of chosen and rejected tokens; it notes the rows it scored."""

    def __init__(self):
        self.rows = []

    def __call__(self, batch, _):
        self.rows += batch["rows"].tolist()
        lengths = batch["completion_mask"].sum(1).float()
        return tuple(lengths.chunk(2))


def lengths(rows):
    return tuple([len(row[side]) for row in rows] for side in ("chosen_ids", "rejected_ids"))


def scored(rows, score, store, batch_size=5, num_workers=0, **parts):
    """Chosen and rejected log-probabilities as lists."""
    logps = reference_logps(rows, score, {**PARTS, **parts}, store, batch_size, num_workers)
    assert logps[0].dtype == torch.float32
    return tuple(side.tolist() for side in logps)


@pytest.fixture
def store(tmp_path):
    return DiskCache(tmp_path / "cache", PLENTY)


@pytest.fixture(scope="module")
def train(processor, rows):
    return PackedDataset(rows.train, processor)


@pytest.fixture(scope="module")
def few(processor, rows):
    return PackedDataset(rows.train.select(range(12)), processor)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (5, 2), (100, 0)])
def test_every_row_gets_its_own_longest_first(train, store, batch_size, num_workers, bars):
    score = Count()
    assert scored(train, score, store, batch_size, num_workers) == lengths(train)
    assert sorted(score.rows) == list(range(48))
    sizes = train.sizes(score.rows)[:, :3].sum(1).tolist()
    assert sizes == sorted(sizes, reverse=True)
    batches = -(-48 // batch_size)
    assert bars == {"reference log-probs": (batches, batches)}


def test_a_second_call_reads_and_computes_nothing(few, store, capsys):
    first = scored(few, Count(), store, revision="main")
    assert scored(few, pytest.fail, store, revision="main") == first
    assert "12 rows, 0 of them computed" in capsys.readouterr().out
    (path,) = store.folder.glob("reference-*/manifest.json")
    assert json.loads(path.read_text())["made_of"]["revision"] == "main"


def test_more_rows_cost_only_themselves(processor, rows, few, store):
    score = Count()
    scored(few, Count(), store)
    more = PackedDataset(rows.train.select(range(19, -1, -1)), processor)  # in another order
    assert scored(more, score, store) == lengths(more)
    assert sorted(score.rows) == list(range(8))
    scored(more, pytest.fail, store)


def test_equal_rows_are_computed_once(processor, rows, store):
    score, repeated = Count(), PackedDataset(rows.train.select([3, 4, 3, 3]), processor)
    assert scored(repeated, score, store) == lengths(repeated)
    assert len(score.rows) == 2


def test_a_damaged_file_is_computed_again_with_a_message(few, store, capsys):
    first = scored(few, Count(), store)
    (path,) = store.folder.glob("reference-*/data.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    score = Count()
    assert scored(few, score, store) == first
    assert len(score.rows) == 12
    assert "is damaged" in capsys.readouterr().out
    scored(few, pytest.fail, store)


def test_a_nan_stops_the_run_and_is_not_stored(few, store):
    def broken(batch, _):
        chosen, rejected = Count()(batch, _)
        return chosen.where(batch["rows"] != 7, float("nan")), rejected

    with pytest.raises(RequestError, match="row 7: the reference's log-probabilities are"):
        scored(few, broken, store)
    assert not list(store.folder.glob("reference-*"))


def test_without_room_it_is_computed_all_the_same(few, tmp_path, capsys):
    assert scored(few, Count(), DiskCache(tmp_path / "cache", 10)) == lengths(few)
    assert "trainer.cache_disk" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert scored(few, Count(), DiskCache(tmp_path / "file", PLENTY)) == lengths(few)
    assert "cache: reference: not stored in" in capsys.readouterr().out


def test_of_two_runs_at_once_one_computes(few, store, tmp_path):
    context, computed = multiprocessing.get_context("fork"), tmp_path / "computed"

    def slow(batch, _):
        with computed.open("a") as file:
            file.write("".join(f"{row}\n" for row in batch["rows"].tolist()))
        time.sleep(0.2)
        return Count()(batch, _)

    def run():
        assert scored(few, slow, store) == lengths(few)

    runs = [context.Process(target=run) for _ in range(2)]
    for process in runs:
        process.start()
    for process in runs:
        process.join(60)
    assert [process.exitcode for process in runs] == [0, 0]
    assert sorted(map(int, computed.read_text().split())) == list(range(12))


# What a key must follow.


def test_every_part_of_the_key_counts(processor, few, store, monkeypatch):
    score = Count()
    scored(few, score, store)
    for part in ("weights", "dtype", "ld_alpha", "attention"):
        score.rows.clear()
        scored(few, score, store, **{part: 0.5})
        assert len(score.rows) == 12
    score.rows.clear()
    monkeypatch.setattr(processor.image_processor, "resample", 3)
    scored(few, score, store)
    assert len(score.rows) == 12


BASE = ([encoded(noise((64, 64)))], "What is this?", "A red square.", "A dog.")


def key_of(processor, row=BASE, max_length=None):
    return row_keys(packed(make(row), processor, max_length))[0]


def test_a_rows_key_follows_its_words_and_pixels(processor):
    pixel = noise((64, 64))
    pixel.putpixel((5, 5), (1, 2, 3))
    images, question, chosen, rejected = BASE
    rows = (
        BASE,
        ([encoded(pixel)], question, chosen, rejected),
        (images, "What is that?", chosen, rejected),
        (images, question, "A red circle.", rejected),
        (images, question, chosen, "A cat."),
        (images, question, rejected, chosen),
        (images * 2, question, chosen, rejected),
    )
    assert len({key_of(processor, row) for row in rows}) == len(rows)
    assert key_of(processor) == key_of(processor)


def test_a_rows_key_follows_where_prompt_and_answer_part(processor):
    """The same tokens in the same order, with another border between them, are another row."""
    rows = packed(make(BASE), processor)
    before = row_keys(rows)
    rows.offsets[1] -= 1
    assert row_keys(rows) != before


def test_a_rows_key_follows_the_truncation(processor):
    row = packed(make(BASE), processor)[0]
    longest = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert key_of(processor, max_length=longest) == key_of(processor)
    assert key_of(processor, max_length=longest - 1) != key_of(processor)


def test_a_rows_key_follows_template_and_tokenizer(processor, monkeypatch):
    before = key_of(processor)
    template = processor.chat_template.replace("Assistant:", "Answer:")
    for name, value in (("chat_template", template), ("image_seq_len", 9)):
        with monkeypatch.context() as patch:
            patch.setattr(processor, name, value)
            assert key_of(processor) != before
    assert key_of(processor) == before


def test_keys_are_the_same_in_every_process(processor, model, command):
    code = (
        "import tests.engine.precompute.test_reference as t\n"
        "from smolvlm_exp.models.model import load_model, load_processor\n"
        "from tests.conftest import compose\n"
        "c = compose().model\n"
        "rows = t.packed(t.make(t.BASE), load_processor(c))\n"
        "print(t.row_keys(rows)[0].hex(), t.cache_key('', **rows.tiling()), t.weights_key(load_model(c)))"
    )
    there = command("-c", code)
    assert there.returncode == 0, there.stderr
    rows = packed(make(BASE), processor)
    assert there.stdout.split()[-3:] == [row_keys(rows)[0].hex(), cache_key("", **rows.tiling()), weights_key(model)]


# The weights' key.


def test_one_element_of_any_tensor_changes_the_weights_key(model):
    keys = {weights_key(model)}
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    for tensor in tensors[:: len(tensors) // 20]:
        last = tensor.detach().view(-1)[-1:]
        before = last.clone()
        last.copy_(torch.nextafter(before, before + 1))
        assert weights_key(model) not in keys
        keys.add(weights_key(model))
        last.copy_(before)
    assert len(keys) > 15


def test_weights_key_follows_dtype_and_config(model):
    before = weights_key(model)
    model.config.text_config.rms_norm_eps = 1e-6
    changed = weights_key(model)
    assert changed != before
    model.config.text_config.rms_norm_eps = 1e-5
    model.config.use_cache = False  # what trainers set
    model.config.pad_token_id = 5
    assert weights_key(model) == before
    assert weights_key(model.to(torch.bfloat16)) not in (before, changed)


def test_weights_key_without_the_adapters(model):
    before = weights_key(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, use_dora=True))
    assert weights_key(tuned) == before
    tuned.add_adapter("other", LoraConfig(target_modules="all-linear", r=8, modules_to_save=["lm_head"]))
    tuned.set_adapter("other")
    assert weights_key(tuned) == before
    with torch.no_grad():
        tuned.get_base_model().model.text_model.layers[0].self_attn.q_proj.base_layer.weight[0, 0] += 1
    assert weights_key(tuned) != before


def test_weights_key_with_an_adapter_that_counts(model):
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=4, use_dora=True), "reference")
    tuned.add_adapter("default", LoraConfig(target_modules=["v_proj"], r=4))
    before = weights_key(tuned, "reference")
    assert before != weights_key(tuned)
    layer = tuned.get_base_model().model.text_model.layers[0].self_attn
    with torch.no_grad():
        layer.v_proj.lora_A["default"].weight[0, 0] += 1
        assert weights_key(tuned, "reference") == before
        layer.q_proj.lora_A["reference"].weight[0, 0] += 1
        one = weights_key(tuned, "reference")
        layer.q_proj.lora_magnitude_vector["reference"].weight[0] += 1
        two = weights_key(tuned, "reference")
    layer.q_proj.scaling["reference"] *= 2
    assert len({before, one, two, weights_key(tuned, "reference")}) == 4


def four_bits(**options):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    return load_model(compose().model, config)


def test_weights_key_follows_the_quantisation(model):
    pytest.importorskip("bitsandbytes")
    nf4 = {"bnb_4bit_quant_type": "nf4"}
    models = [four_bits(**nf4), four_bits(bnb_4bit_quant_type="fp4"), four_bits(**nf4, bnb_4bit_use_double_quant=True)]
    keys = [weights_key(each) for each in (model, *models)]
    assert len(set(keys)) == 4
    assert weights_key(four_bits(**nf4)) == keys[1]
    weights = [next(p for p in each.parameters() if hasattr(p, "quant_state")) for each in models]
    weights[0].quant_state.absmax[3] += 1e-3
    weights[1].quant_state.quant_type = "nf4"
    weights[2].quant_state.state2.absmax[0] += 1e-3
    assert all(weights_key(each) != key for each, key in zip(models, keys[1:], strict=True))


def test_the_hash_sees_what_sums_would_miss():
    zeros = torch.zeros(3 * 2**20 + 5, dtype=torch.float32)
    hashes = {tuple(content_hash([zeros]).tolist())}
    assert len(content_hash([zeros])) == 2
    for places in ([0], [1], [0, 2], [0, 2**21], [-1], [5, 7]):  # signs alone: the top bit of words
        changed = zeros.clone()
        changed[places] = -0.0
        hashes.add(tuple(content_hash([changed]).tolist()))
    assert len(hashes) == 7
    pair = torch.arange(16.0)
    assert not torch.equal(content_hash([pair]), content_hash([pair.flip(0)]))
    assert not torch.equal(content_hash([pair[:8], pair[8:]]), content_hash([pair[8:], pair[:8]]))
    assert torch.equal(content_hash([pair[1:4]]), content_hash([pair[1:4].clone()]))  # 12 bytes, and out of step
    assert torch.equal(content_hash([pair.view(4, 4).T]), content_hash([pair.view(4, 4).T.contiguous()]))


@pytest.mark.gpu
def test_weights_key_is_the_same_on_a_gpu(model):
    before = weights_key(model)
    assert weights_key(model.to("cuda")) == before


@pytest.mark.gpu
def test_weights_key_of_8_bits_is_the_same_after_a_forward(processor, rows):
    eight = load_model(compose("model.device_map=cuda").model, BitsAndBytesConfig(load_in_8bit=True))
    before = weights_key(eight)
    answer_logps(eight, processor, rows.test.select(range(2)), 2, None)
    assert weights_key(eight) == before
    states = (getattr(module, "state", None) for module in eight.modules())
    next(state.SCB for state in states if getattr(state, "SCB", None) is not None)[0] += 1e-3
    assert weights_key(eight) != before
