"""Reference log-probabilities: right, computed once, and never those of something else."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import compose
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from smolvlm_exp.engine.disk_cache import DiskCache, cache_key
from smolvlm_exp.engine.fingerprint import content_hash, weights_key
from smolvlm_exp.engine.forward import add_pair_forward
from smolvlm_exp.engine.inputs.dataset import Collator, PackedDataset
from smolvlm_exp.engine.inputs.tiles import pixels
from smolvlm_exp.engine.precompute.reference import reference_logps, row_keys, tiling
from smolvlm_exp.evaluation.preference import answer_logps
from smolvlm_exp.models.model import load_model
from tests.engine.inputs.test_dataset import encoded, make, noise, packed

PLENTY = 2**40
PARTS = {"weights": "of the test", "dtype": "float32", "ld_alpha": None}


def collator(processor, rows):
    return Collator(PackedDataset(rows, processor), processor.tokenizer.pad_token_id, processor.image_token_id)


class Count:
    """A reference that is easily foretold: chosen and rejected tokens, and the rows it was asked for."""

    def __init__(self):
        self.rows = []

    def __call__(self, batch):
        self.rows += batch["rows"].tolist()
        lengths = batch["completion_mask"].sum(1).float()
        return tuple(lengths.chunk(2))


def lengths(rows):
    found = [rows[i] for i in range(len(rows))]
    return [len(row["chosen_ids"]) for row in found], [len(row["rejected_ids"]) for row in found]


@pytest.fixture
def store(tmp_path):
    return DiskCache(tmp_path / "cache", PLENTY)


def test_the_numbers_are_those_of_plain_scoring(processor, rows, model):
    expected = answer_logps(model, processor, rows.train, 8, None)
    add_pair_forward(model, pixels(processor), ("log_probs",))

    @torch.no_grad()
    def score(batch):
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        found = model(input_ids=batch["input_ids"], labels=labels, packed=batch["packed"])
        return found.log_probs.sum(1).chunk(2)

    chosen, rejected = reference_logps(collator(processor, rows.train), score, PARTS, None, batch_size=5)
    torch.testing.assert_close(chosen, expected.chosen, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(rejected, expected.rejected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_row_gets_its_own(processor, rows, batch_size, num_workers):
    feed, score = collator(processor, rows.train), Count()
    chosen, rejected = reference_logps(feed, score, PARTS, None, batch_size, num_workers)
    assert (chosen.tolist(), rejected.tolist()) == lengths(feed.rows)
    assert chosen.dtype == torch.float32
    assert sorted(score.rows) == list(range(48))


def test_rows_of_about_one_length_go_together_the_longest_first(processor, rows):
    feed, score = collator(processor, rows.train), Count()
    reference_logps(feed, score, PARTS, None, 5)
    asked = feed.rows.sizes[score.rows, :3].sum(1).tolist()
    assert asked == sorted(asked, reverse=True)


def test_a_second_call_reads_and_computes_nothing(processor, rows, store, capsys):
    feed, score = collator(processor, rows.train), Count()
    first = reference_logps(feed, score, PARTS, store, 5)
    again = reference_logps(feed, pytest.fail, PARTS, store, 5)
    assert all(map(torch.equal, first, again))
    assert "48 rows, 0 of them computed" in capsys.readouterr().out


def test_more_rows_cost_only_themselves(processor, rows, store):
    score = Count()
    reference_logps(collator(processor, rows.train.select(range(40))), score, PARTS, store, 5)
    score.rows.clear()
    feed = collator(processor, rows.train.select(range(47, -1, -1)))  # in another order
    found = reference_logps(feed, score, PARTS, store, 5)
    assert sorted(score.rows) == list(range(8))
    assert tuple(logps.tolist() for logps in found) == lengths(feed.rows)
    reference_logps(feed, pytest.fail, PARTS, store, 5)


def test_equal_rows_are_computed_once(processor, rows):
    score = Count()
    feed = collator(processor, rows.train.select([3, 4, 3, 3]))
    chosen, _ = reference_logps(feed, score, PARTS, None, 5)
    assert len(score.rows) == 2
    assert chosen.tolist() == lengths(feed.rows)[0]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_damaged_file_is_computed_again_and_said(processor, rows, store, harm, capsys):
    feed = collator(processor, rows.train)
    first = reference_logps(feed, Count(), PARTS, store, 5)
    (path,) = store.folder.glob("reference-*/data.safetensors")
    harm(path)
    score = Count()
    again = reference_logps(feed, score, PARTS, store, 5)
    assert all(map(torch.equal, first, again))
    assert len(score.rows) == 48
    assert "is damaged" in capsys.readouterr().out
    reference_logps(feed, pytest.fail, PARTS, store, 5)


def test_numbers_that_are_none_stop_the_run_and_are_not_kept(processor, rows, store):
    def broken(batch):
        chosen, rejected = Count()(batch)
        return chosen.where(batch["rows"] != 7, float("nan")), rejected

    with pytest.raises(ValueError, match="row 7: the reference's log-probabilities are"):
        reference_logps(collator(processor, rows.train), broken, PARTS, store, 5)
    assert not list(store.folder.glob("reference-*"))


def test_without_room_it_computes_all_the_same(processor, rows, tmp_path, capsys):
    feed = collator(processor, rows.train)
    found = reference_logps(feed, Count(), PARTS, DiskCache(tmp_path / "cache", 10), 5)
    assert tuple(logps.tolist() for logps in found) == lengths(feed.rows)
    assert "trainer.cache_disk" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    reference_logps(feed, Count(), PARTS, DiskCache(tmp_path / "file", PLENTY), 5)
    assert "cannot be kept" in capsys.readouterr().out


def ask(feed, folder, log):
    def slow(batch):
        with log.open("a") as file:
            file.write("".join(f"{row}\n" for row in batch["rows"].tolist()))
        time.sleep(0.5)
        return Count()(batch)

    found = reference_logps(feed, slow, PARTS, DiskCache(folder, PLENTY), 4)
    assert tuple(logps.tolist() for logps in found) == lengths(feed.rows)


def test_of_two_runs_that_ask_at_once_one_computes(processor, rows, store, tmp_path):
    feed, log = collator(processor, rows.train.select(range(12))), tmp_path / "log"
    askers = [multiprocessing.get_context("fork").Process(target=ask, args=(feed, store.folder, log)) for _ in range(2)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(60)
    assert [asker.exitcode for asker in askers] == [0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(12))


# What a key must follow.


@pytest.mark.parametrize("part", ["weights", "dtype", "ld_alpha", "attention"])
def test_every_part_of_the_key_counts(processor, rows, store, part):
    feed, score = collator(processor, rows.train.select(range(4))), Count()
    reference_logps(feed, score, PARTS, store, 5)
    reference_logps(feed, score, {**PARTS, part: 0.5}, store, 5)
    assert len(score.rows) == 8


def test_without_its_parts_there_is_no_key(processor, rows):
    with pytest.raises(AssertionError):
        reference_logps(collator(processor, rows.train), Count(), {"weights": "", "dtype": ""}, None, 5)


BASE = ([encoded(noise((64, 64)))], "What is this?", "A red square.", "A dog.")


def keys_of(processor, row=BASE, max_length=None):
    rows = packed(make(row), processor, max_length)
    return row_keys(rows)[0], cache_key("", **tiling(rows))


def test_a_rows_key_follows_its_words_and_pixels(processor):
    pixel = noise((64, 64))
    pixel.putpixel((5, 5), (1, 2, 3))
    images, question, chosen, rejected = BASE
    before = keys_of(processor)
    assert keys_of(processor) == before
    for row in (
        ([encoded(pixel)], question, chosen, rejected),
        (images, "What is that?", chosen, rejected),
        (images, question, "A red circle.", rejected),
        (images, question, chosen, "A cat."),
        (images, question, rejected, chosen),
        (images * 2, question, chosen, rejected),
    ):
        assert keys_of(processor, row)[0] != before[0]


def test_a_rows_key_follows_where_prompt_and_answer_part(processor):
    """The same tokens in the same order, with another border between them, are another row."""
    rows = packed(make(BASE), processor)
    before = row_keys(rows)
    rows.offsets[1] -= 1
    assert row_keys(rows) != before


def test_a_rows_key_follows_the_cut(processor):
    row = packed(make(BASE), processor)[0]
    whole = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert keys_of(processor, max_length=whole) == keys_of(processor)
    assert keys_of(processor, max_length=whole - 1)[0] != keys_of(processor)[0]


def test_a_rows_key_follows_template_and_tokenizer(processor, monkeypatch):
    before = keys_of(processor)
    with monkeypatch.context() as patch:
        patch.setattr(processor, "chat_template", processor.chat_template.replace("Assistant:", "Answer:"))
        assert keys_of(processor)[0] != before[0]
    with monkeypatch.context() as patch:
        patch.setattr(processor, "image_seq_len", 9)
        assert keys_of(processor)[0] != before[0]
    assert keys_of(processor) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", {"longest_edge": 64}), ("resample", 3), ("image_mean", [0.4] * 3), ("image_std", [1] * 3)],
)
def test_the_key_follows_the_image_processor(processor, monkeypatch, name, value):
    before = keys_of(processor)[1]
    monkeypatch.setattr(processor.image_processor, name, value)
    assert keys_of(processor)[1] != before


def test_keys_are_the_same_in_every_process(processor, model):
    code = (
        "import tests.engine.precompute.test_reference as t\n"
        "from smolvlm_exp.models.model import load_model, load_processor\n"
        "from tests.conftest import compose\n"
        "c = compose().model\n"
        "row, tiles = t.keys_of(load_processor(c))\n"
        "print(row.hex(), tiles, t.weights_key(load_model(c)))"
    )
    paths = [path for path in sys.path if path]
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    row, tiles = keys_of(processor)
    assert there.split()[-3:] == [row.hex(), tiles, weights_key(model)]


# The weights' key.


def test_one_element_of_any_tensor_changes_the_weights_key(model):
    seen = {weights_key(model)}
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors[:: len(tensors) // 20]:
        if tensor.is_floating_point():
            with torch.no_grad():
                value = tensor.view(-1)[-1].clone()
                tensor.view(-1)[-1] = torch.nextafter(value, value + 1)
                seen.add(weights_key(model))
                tensor.view(-1)[-1] = value
        assert weights_key(model) in seen
    assert len(seen) > 15


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


def test_the_manifest_says_what_it_is_of(processor, rows, store):
    reference_logps(collator(processor, rows.train), Count(), {**PARTS, "revision": "main"}, store, 5)
    (path,) = store.folder.glob("reference-*/manifest.json")
    assert json.loads(path.read_text())["made_of"]["revision"] == "main"


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
    (scales,) = [m.state.SCB for m in eight.modules() if getattr(getattr(m, "state", None), "SCB", None) is not None][
        :1
    ]
    scales[0] += 1e-3
    assert weights_key(eight) != before
