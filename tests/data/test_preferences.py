"""The checks every row passes: exact token ids from sizes alone, and each defect named."""

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from smolvlm_exp.data.messages import assistant, user
from smolvlm_exp.data.parallel import worker_count
from smolvlm_exp.data.preferences import SIDES, count, load_preferences, prepare, source_of
from smolvlm_exp.data.sources.files import Config as FilesConfig
from smolvlm_exp.data.sources.shapes import Config
from smolvlm_exp.data.tokens import image_span
from smolvlm_exp.data.validation import RowValidator
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.models.shape import make_processor, shape_of
from smolvlm_exp.models.tokenizer import stand_in_tokenizer
from smolvlm_exp.utils.errors import RequestError


def row(**changes):
    answers = {"chosen": [assistant("A star.")], "rejected": [assistant("A moon.")]}
    return {"images": [Image.new("RGB", (96, 64))], "prompt": [user("What is it?")], **answers, **changes}


def problems_of(processor, *rows, **settings):
    return prepare(Dataset.from_list(list(rows)), processor, Config(**settings))["problem"][:]


def test_a_placeholder_in_an_answer_is_a_control_token(processor):
    problems = problems_of(processor, row(), row(chosen=[assistant("A <image> star.")]))
    assert [problem.partition(",")[0] for problem in problems] == ["", "`chosen` contains <image>"]


def test_bad_rows_stop_the_run_or_are_listed(processor, tmp_path, monkeypatch):
    from smolvlm_exp.data.sources import shapes

    def load(config, split):
        return Dataset.from_list([row(), row(rejected=[assistant("")])])

    monkeypatch.setattr(shapes, "load", load)
    with pytest.raises(RequestError, match=r"train row 1: `rejected` is empty[\s\S]*data.on_bad_row=skip"):
        load_preferences(Config(source="shapes"), processor, tmp_path)
    preferences = load_preferences(Config(source="shapes", on_bad_row="skip", max_bad_rows=0.5), processor, tmp_path)
    assert len(preferences.train) == len(preferences.test) == 1
    assert '"row": 1' in (Path(tmp_path) / "skipped_rows.jsonl").read_text()


def test_one_split_is_read_with_the_words_of_both(processor, tmp_path):
    """A caption is measured alike by a run and by what loads its held-out rows alone, or has no others."""
    for name, thing, colour in (("train", "dog", (9, 9, 9)), ("test", "cat", (5, 5, 5))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{thing}.png")
        line = json.dumps({"image": f"{thing}.png", "question": "What is it?", "objects": [thing]})
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    config = FilesConfig(source="files", folder=str(tmp_path))
    run = load_preferences(config, processor, tmp_path, answers=False)
    alone = load_preferences(config, processor, tmp_path, splits=("test",))
    assert run.words("A dog and a cat.", {}) == alone.words("A dog and a cat.", {}) == [("dog", "dog"), ("cat", "cat")]
    saved = source_of(config).load(config, "test").remove_columns("problem")
    DatasetDict({"test": saved}).save_to_disk(tmp_path / "saved")
    lone = load_preferences(
        FilesConfig(source="files", folder=str(tmp_path / "saved")), processor, tmp_path, splits=("test",)
    )
    assert lone.words("A dog and a cat.", {}) == [("cat", "cat")]


def test_length_policy(processor):
    two = row(), row(chosen=[assistant("A star. " * 30)])
    full = count(prepare(Dataset.from_list(two), processor, Config()))
    assert full["cut"] == 0
    short = full["longest"] - 20
    cut = prepare(Dataset.from_list(two), processor, Config(max_length=short))
    assert count(cut) == {**full, "cut": 1}
    assert cut[1]["prompt_tokens"] + cut[1]["chosen_tokens"] == short
    assert problems_of(processor, *two, max_length=short, on_long_answer="report") == [
        "", f"the longer answer runs 20 tokens past data.max_length={short}"
    ]  # fmt: skip
    assert all("leaves none for the answer" in problem for problem in problems_of(processor, *two, max_length=50))


SIZES = list(itertools.product((17, 64, 100, 129, 511, 640), (33, 64, 384, 500, 1023)))


def test_what_the_model_cannot_read(processor):
    """The embedded model has 1,024 positions."""
    rows = [row(prompt=[user("word " * 1100)]), row(chosen=[assistant("word " * 1100)])]
    assert processor.tokenizer.model_max_length == 1024
    long, cut = problems_of(processor, *rows)
    assert re.fullmatch(r"it is \d,\d\d\d tokens, and the model reads 1,024: shorten it", long)
    assert cut.endswith(", or cut its answers with data.max_length=1024")
    assert problems_of(processor, rows[1], max_length=1024) == [""]


@pytest.mark.parametrize("name", ["tiny", "smolvlm", "smolvlm_256m", "smolvlm2_2b"])  # the others are processed alike
def test_token_ids_are_the_processors_without_decoding(name):
    """Against the processor itself, over many aspect ratios."""
    from trl.data_utils import apply_chat_template

    processor = make_processor(shape_of(name), stand_in_tokenizer(shape_of(name)))
    validate = RowValidator(processor, None, "cut")
    for width, height in SIZES[:: 1 if name == "tiny" else 6]:
        example = row()
        facts = validate({**example, "sizes": [[width, height]], "problem": ""})
        texts = apply_chat_template({k: example[k] for k in ("prompt", "chosen", "rejected")}, processor)
        made = processor(images=[[Image.new("RGB", (width, height))]], text=[texts["prompt"]], add_special_tokens=False)
        ids = list(made["input_ids"][0])
        assert facts["token_ids"][: facts["prompt_tokens"]] == ids, (width, height)
        assert facts["image_tokens"] == ids.count(processor.image_token_id)
        answers = [processor.tokenizer(texts[side], add_special_tokens=False)["input_ids"] for side in SIDES[1:]]
        assert facts["token_ids"][len(ids) :] == [*answers[0], *answers[1]]
        rows, columns = facts["tile_rows"][0], facts["tile_columns"][0]
        assert image_span(rows, columns, processor.image_seq_len) == processor.replace_image_token(
            {"rows": [[rows]], "cols": [[columns]]}, 0
        )


def test_an_image_is_decoded_hashed_and_tokenised_once(processor, tmp_path, monkeypatch):
    """On its way from a file to a batch; what is cut into tiles is the row's own, prepared image."""
    calls = Counter()

    def counted(kind, owner, name):
        function = getattr(owner, name)

        def count(*args, **kwargs):
            if kind != "hash" or len(b"".join(args)) > 200:  # an image's file, and no key
                calls[kind] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    Image.effect_noise((200, 100), 50).convert("RGB").save(tmp_path / "noise.png")
    pair = {"image": "noise.png", "question": "What is it?", "chosen": "A star.", "rejected": "A moon."}
    (tmp_path / "train.jsonl").write_text(json.dumps(pair) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps({**pair, "question": "Which?"}) + "\n")
    counted("open", Image, "open")
    counted("hash", hashlib, "sha256")
    counted("tokenise", type(processor.tokenizer), "__call__")
    config = FilesConfig(source="files", folder=str(tmp_path))
    train = load_preferences(config, processor, tmp_path).train
    assert calls == {"open": 2, "hash": 2, "tokenise": 2}  # of two rows
    calls.clear()
    rows = PackedDataset(train, processor)
    assert not calls
    batch = rows.batch([0])
    assert calls == {"open": 1}
    (down,), (across,) = train["tile_rows"][0], train["tile_columns"][0]
    assert len(batch["packed"]["tiles"]) == down * across + 1


def test_small_sets_are_prepared_in_this_process():
    assert worker_count(None, 40) is None
    assert worker_count(3, 40) == 3


def test_all_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr("smolvlm_exp.data.parallel.usable_cores", lambda: 24)
    assert [worker_count(None, rows) for rows in (48, 160, 20_000)] == [3, 10, 24]
    assert worker_count(None, 20_000, least=5_000) == 4
