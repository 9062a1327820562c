"""Every source gives the normal form, whatever its columns; what cannot be read is named, with the fix."""

import base64
import csv
import json
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import pytest
from omegaconf import OmegaConf
from PIL import Image

from smolvlm_exp.data.formats import conversation
from smolvlm_exp.data.loading import hold_out, select_split
from smolvlm_exp.data.messages import assistant, features, text_of, user
from smolvlm_exp.data.preferences import load_preferences, prepare, without_single_answers
from smolvlm_exp.data.sources import files, hub, mmpr, photos
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.paths import CONF
from tests.conftest import read_lines

AWKWARD = 'A dog, "big"\nand\u2028black.'  # quotes, commas and line breaks of two kinds


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save_image(path: Path, colour: Any = (255, 0, 0), size: tuple[int, int] = (6, 4)) -> None:
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the images 0.png to 9.png, each of another colour."""
    (tmp_path / "pairs").mkdir()
    for number in range(10):
        save_image(tmp_path / "pairs" / f"{number}.png", (20 * number, 0, 0))
    return tmp_path / "pairs"


def plain(number: int, **changes: Any) -> dict[str, Any]:
    answers = {"chosen": f"It is {number}.", "rejected": "A dog."}
    return {"image": f"{number}.png", "question": f"What is {number}?", **answers, **changes}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def prepared(processor):
    def prepared(source, split, **settings):
        config = source.Config(**settings)
        return prepare(without_single_answers(source.load(config, split or config.train)), processor, config)

    return prepared


@pytest.fixture
def load(folder, prepared):
    """data=files over `folder`."""
    return lambda split="train", **changes: prepared(files, split, **{"folder": str(folder), **changes})


# The columns of other projects

NORMAL = {"prompt": [user("What is it?")], "chosen": [assistant("A cat.")], "rejected": [assistant("A dog.")]}
ANSWERS = {"chosen": "A cat.", "rejected": "A dog."}
TURNS = {"chosen": {"from": "gpt", "value": "In colour."}, "rejected": {"from": "gpt", "value": "In size."}}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What is it?", **ANSWERS},
        {"prompt": "<image>\nWhat is it?", **ANSWERS},
        NORMAL,
        {
            "conversations": [{"from": "human", "value": "<image>What is it?"}],
            **{side: {"from": "gpt", "value": answer} for side, answer in ANSWERS.items()},
        },
        {
            "messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}],
            "rejected_response": "A dog.",
        },
        {
            "messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}],
            "rejected": "A dog.",
        },
        {"messages": [{"role": "user", "content": "What is it?"}], **ANSWERS},
    ],
    ids=["plain", "placeholder", "rlaif-v", "llama-factory", "ms-swift", "messages, rejected", "messages, both"],
)
def test_every_format_gives_the_same_messages(row):
    assert conversation(row, images=1) == NORMAL


def test_several_turns_several_images_and_a_system_message():
    values = ("Compare <image> with <image>.", "They differ.", "How?")
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    prompt = conversation({"system": "Be brief.", "conversations": turns, **TURNS}, images=2)["prompt"]
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user"]
    assert [part["text"] or part["type"] for part in prompt[1]["content"]] == ["Compare", "image", "with", "image", "."]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [user("Hi")], "rejected_response": "x"}, "should end with the chosen answer"),
        ({"prompt": [{"role": "user", "content": [{"type": None}]}]}, "a part of type None"),
    ],
)
def test_malformed_messages(row, said):
    with pytest.raises(ValueError, match=said):
        conversation(row, images=1)


# data=files


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> None:
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet_with_images(folder: Path, rows: list[dict[str, Any]]) -> None:
    embedded = [{**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": "x.png"}} for row in rows]
    table = datasets.Dataset.from_list(embedded).cast_column("image", datasets.Image())
    table.to_parquet(folder / "pairs.parquet")


def write_saved(folder: Path, rows: list[dict[str, Any]]) -> None:
    embedded = [{**row, "images": [str(folder / row["image"])]} for row in rows]
    table = datasets.Dataset.from_list(embedded).cast_column("images", datasets.List(datasets.Image()))
    table.remove_columns("image").save_to_disk(folder)


WRITERS = {
    "jsonl": lambda folder, rows: write_lines(folder / "pairs.jsonl", rows),
    "json": lambda folder, rows: (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8"),
    "csv": write_csv,
    "parquet": lambda folder, rows: datasets.Dataset.from_list(rows).to_parquet(folder / "pairs.parquet"),
    "parquet with images": write_parquet_with_images,
    "save_to_disk": write_saved,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_round_trip(folder, load, write):
    write(folder, [plain(number, rejected=AWKWARD) for number in range(10)])
    train, test = load(), load("test")
    assert (len(train), len(test)) == (9, 1)
    for number, row in enumerate(sorted([*train, *test], key=lambda row: text_of(row["prompt"]))):
        assert row["problem"] == ""
        assert row["prompt"] == [user(f"What is {number}?")]
        assert row["chosen"] == [assistant(f"It is {number}.")]
        assert row["rejected"] == [assistant(AWKWARD)]
        assert row["images"][0].getpixel((0, 0)) == (20 * number, 0, 0)
        assert row["images"][0].size == (6, 4)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_rows_with_what_is_known_in_place_of_answers(folder, load, write):
    """Held out by image as pairs are; CSV and Parquet hold the objects as text."""
    rows = [{"image": f"{number}.png", "question": f"What is {number}?"} for number in range(10)]
    known = [
        {"answer": "7", "objects": ""} if number % 2 else {"answer": "", "objects": "dog, cat"} for number in range(10)
    ]
    write(folder, [{**row, **truth} for row, truth in zip(rows, known, strict=True)])
    train, test = load(), load("test")
    assert (len(train), len(test)) == (9, 1)
    assert not {"chosen", "rejected"} & {*train.column_names, *test.column_names}
    for row in [*train, *test]:
        number = int(text_of(row["prompt"]).split()[-1][0])
        assert row["problem"] == ""
        assert json.loads(row["truth"]) == (
            {"kind": "number", "answer": 7} if number % 2 else {"kind": "caption", "objects": ["dog", "cat"]}
        )
        assert row["images"][0].getpixel((0, 0)) == (20 * number, 0, 0)
        assert (row["chosen_tokens"], row["rejected_tokens"]) == (0, 0)
        assert len(row["token_ids"]) == row["prompt_tokens"] == row["uncut_tokens"]


def test_pairs_may_have_a_truth_too(folder, load):
    write_lines(folder / "pairs.jsonl", [plain(0, truth={"kind": "yes_no", "answer": "yes"}), plain(1), plain(2)])
    rows = [*load(), *load("test")]
    assert {row["truth"] for row in rows} == {'{"kind": "yes_no", "answer": "yes"}', None}
    assert all(text_of(row["chosen"]) and not row["problem"] for row in rows)


LLAVA = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


@pytest.mark.parametrize(
    ("row", "turns", "answer"),
    [
        ({"question": "What is it?", "answer": "A cat."}, 1, "A cat."),
        ({"question": "What is it?", "answer": ["A cat.", "A tabby."]}, 1, "A cat."),
        ({"question": "Is it a cat?", "answer": True}, 1, "yes"),
        ({"question": "How many?", "answer": 0}, 1, "0"),
        ({"prompt": "What is it?", "chosen": "A cat."}, 1, "A cat."),
        ({"question": "What is it?", "caption": "A cat."}, 1, "A cat."),
        ({"conversations": LLAVA}, 1, "A cat."),
        ({"conversations": [*LLAVA, {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]}, 3, "Yes."),
        ({"messages": [user("What is it?"), assistant("A cat.")]}, 1, "A cat."),
    ],
)
def test_one_answer_is_enough_for_sft(folder, processor, tmp_path, row, turns, answer):
    write_lines(folder / "rows.jsonl", [{"image": f"{number}.png", **row} for number in range(10)])
    config = files.Config(source="files", folder=str(folder))
    rows = load_preferences(config, processor, tmp_path, rejected=False).train
    assert text_of(rows[0]["chosen"]) == answer
    assert len(rows[0]["prompt"]) == turns
    assert [part["type"] for part in rows[0]["prompt"][0]["content"]] == ["image", "text"]
    assert "rejected" not in rows.column_names
    assert (rows[0]["chosen_tokens"] > 0, rows[0]["rejected_tokens"]) == (True, 0)
    with pytest.raises(RequestError, match=r"trainer=sft learns from answers without a rejected one"):
        load_preferences(config, processor, tmp_path)


def test_one_answer_is_no_part_of_a_row_that_is_learned_from_by_scores(folder, processor, tmp_path):
    write_lines(folder / "rows.jsonl", [{"image": f"{i}.png", "question": "What?", "answer": "red"} for i in range(10)])
    config = files.Config(source="files", folder=str(folder))
    rows = load_preferences(config, processor, tmp_path, answers=False).train
    assert not {"chosen", "rejected"} & {*rows.column_names}
    write_lines(folder / "rows.jsonl", [{"image": f"{i}.png", "question": "?", "objects": ["a"]} for i in range(10)])
    with pytest.raises(RequestError, match=r"no answer to learn from: `answer`, `chosen`, or a conversation"):
        load_preferences(config, processor, tmp_path, rejected=False)


def test_a_row_of_which_nothing_is_known(folder, load):
    rows = [
        {"image": f"{n}.png", "question": "?", "answer": answer} for n, answer in enumerate(("red", "", ["red", {}]))
    ]
    write_lines(folder / "train.jsonl", rows)
    write_lines(folder / "test.jsonl", rows)
    assert load()["problem"][:] == [
        "",
        "it has nothing to score an answer by: `truth`, `answer`, `objects`, `caption` are empty",
        "`answer` is {}, not a text",
    ]


def test_train_and_test_files_are_used(folder, load):
    write_lines(folder / "train.jsonl", [plain(number) for number in range(6)])
    write_lines(folder / "test.jsonl", [plain(number) for number in range(6, 10)])
    assert [len(load(split)) for split in ("train", "test", "train[:2]")] == [6, 4, 2]


def test_rows_of_one_image_are_held_out_together(folder, load):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())  # the same image under another name
    rows = [plain(number) for number in range(10)]
    write_lines(folder / "pairs.jsonl", rows + rows + [plain(0, image="copy.png")])
    train, test = ({row["images"][0].getpixel((0, 0)) for row in load(split)} for split in ("train", "test"))
    assert not train & test
    assert len(test) in (1, 2)


def test_held_out_rows_do_not_depend_on_the_order():
    rows = datasets.Dataset.from_dict({"key": [f"k{index // 2}" for index in range(200)]})
    splits = hold_out(rows, rows["key"], 0.1)
    assert (len(splits["train"]), len(splits["test"])) == (180, 20)
    again = rows.shuffle(seed=1)
    assert set(hold_out(again, again["key"], 0.1)["test"]["key"]) == set(splits["test"]["key"])


@pytest.mark.parametrize(
    ("fraction", "keys", "said"), [(0.0, ["a", "b"], "test_fraction"), (0.1, ["a", "a"], "held out")]
)
def test_rows_that_cannot_be_split(fraction, keys, said):
    with pytest.raises(RequestError, match=said):
        hold_out(datasets.Dataset.from_dict({"key": keys}), keys, fraction)


def test_files_that_only_begin_like_a_split_are_not_read(folder, load, caplog):
    parts = {
        "train-00000-of-00002": [0, 1],
        "train-00001-of-00002": [2],
        "train_old": [3],
        "test": [4],
        "test_more": [5],
    }
    for name, numbers in parts.items():
        write_lines(folder / f"{name}.jsonl", [plain(number) for number in numbers])
    assert [text_of(row) for split in ("train", "test") for row in load(split)["chosen"][:]] == [
        f"It is {number}." for number in (0, 1, 2, 4)
    ]
    assert "train from train-00000-of-00002.jsonl, train-00001-of-00002.jsonl; test from test.jsonl" in caplog.text


def test_json_is_read_however_it_is_laid_out(folder, load):
    rows = [plain(number) for number in range(4)]
    for name, text in {"a.jsonl": json.dumps(rows, indent=1), "b.json": "\n".join(map(json.dumps, rows))}.items():
        (folder / name).write_text(text)
        assert len(load(rows=name)) == 3


def test_a_fault_that_all_rows_share_is_told(folder, processor, tmp_path):
    write_lines(folder / "pairs.jsonl", [plain(0, image=f"https://example.com/{number}.png") for number in range(5)])
    for skip in ("error", "skip"):
        config = files.Config(source="files", folder=str(folder), on_bad_row=skip)
        with pytest.raises(RequestError, match=r"image 1 is a URL; download it first: https://example\.com"):
            load_preferences(config, processor, tmp_path)


def test_images_in_the_rows_themselves(folder, load):
    data = (folder / "3.png").read_bytes()
    text = base64.b64encode(data).decode()
    long = base64.b64encode(data + bytes(4096)).decode()
    spelled = [
        f"data:image/png;base64,{text}",
        f"DATA:IMAGE/PNG;charset=utf-8;BASE64,{text.rstrip('=')}",
        "data:image/png;base64," + "\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
        long,
    ]
    write_lines(folder / "train.jsonl", [plain(0, image=image) for image in spelled])
    write_lines(folder / "test.jsonl", [plain(0, image=str(folder / "3.png"))])
    for row in [*load(), *load("test")]:
        assert (row["problem"], row["images"][0].getpixel((0, 0))) == ("", (60, 0, 0))


def test_long_values_are_cut_in_messages(folder, load):
    write_lines(folder / "train.jsonl", [plain(0, image="http://" + "a" * 9_000), plain(0, image="é/" * 4_500)])
    write_lines(folder / "test.jsonl", [plain(0)])
    assert all(0 < len(problem) < 500 for problem in load()["problem"][:])


@pytest.mark.parametrize(("file", "row"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_with_accents_are_found_in_either_spelling(folder, load, file, row):
    names = {form: unicodedata.normalize(form, "été.png") for form in ("NFC", "NFD")}
    save_image(folder / names[file], (9, 0, 0))
    for split in ("train", "test"):
        write_lines(folder / f"{split}.jsonl", [plain(0, image=names[row])])
    assert load()[0]["images"][0].getpixel((0, 0)) == (9, 0, 0)


def test_paths_as_windows_and_addresses_write_them(folder, load):
    (folder / "my images").mkdir()
    save_image(folder / "my images" / "a 1.png", (9, 0, 0))
    for split in ("train", "test"):
        names = ("my images\\a 1.png", "my%20images/a%201.png", "..\\..\\etc\\passwd")
        write_lines(folder / f"{split}.jsonl", [plain(i, image=name) for i, name in enumerate(names)])
    rows = load()
    assert [rows[i]["images"][0].getpixel((0, 0)) for i in (0, 1)] == [(9, 0, 0)] * 2
    assert "lies outside" in rows["problem"][2] or "is not there" in rows["problem"][2]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_spreadsheets(folder, load, separator):
    lines = [["Image", "Question", "chosen ", "rejected"], ["0.png", "What, and where?", "A cat.", "A dog."]]
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("".join(separator.join(line) + "\n" for line in lines))
    assert text_of(load()[0]["prompt"]) == "What, and where?"


def test_answers_that_are_numbers_or_code(folder, load):
    rows = [plain(0, chosen=0, rejected=1.5), plain(1, chosen="    return x\n", rejected="return y")]
    rows += [plain(2, chosen=False)]
    for split in ("train", "test"):
        write_lines(folder / f"{split}.jsonl", rows)
    made = load()
    assert [text_of(made[0][side]) for side in ("chosen", "rejected")] == ["0", "1.5"]
    assert text_of(made[1]["chosen"]) == "    return x"
    assert made["problem"][:] == ["", "", "an answer or question is false; write it as the text that should be read"]


def test_a_split_of_bad_rows_alone(folder, load):
    write_lines(folder / "train.jsonl", [plain(0, image="gone.png")])
    write_lines(folder / "test.jsonl", [plain(1)])
    rows = load()
    assert (rows["images"][0], rows["image_sha256"][0]) == ([], [])
    assert rows["problem"][0].startswith("image 1 is not there: gone.png")


def test_an_image_that_changed_is_read_again(folder, load):
    for name in ("train", "test"):
        write_lines(folder / f"{name}.jsonl", [plain(0)])
    assert load()[0]["images"][0].size == (6, 4)
    save_image(folder / "0.png", size=(9, 9))
    assert load()[0]["images"][0].size == (9, 9)


def test_missing_columns_are_answered_with_what_is_expected(folder, load):
    write_lines(folder / "pairs.jsonl", [{"image": "0.png", "question": "?", "reply": "!"}])
    with pytest.raises(RequestError) as error:
        load()
    assert "pairs.jsonl has the columns image, question, reply" in str(error.value)
    assert "image or images, question or prompt, chosen, rejected" in str(error.value)
    assert "question or prompt or conversations, truth or answer or objects or caption." in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"image": "0.png"}\n{"image": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl entry 1 is int"),
        ("a.jsonl", "[" * 100_000, "a.jsonl is nested too deep"),
        ("a.json", '{\n "data": []\n}', "a.json is one JSON object over several lines, not a list of rows"),
        ("a.jsonl", "\n\n", "a.jsonl has no rows"),
        ("a.csv", "image,question,chosen,rejected\n", "a.csv has no rows"),
        ("a.json", '{"version": 1, "data": []}', "Its rows may be those in its `data`: save that list alone."),
        ("a.json", "[{]", "a.json is not JSON"),
        ("a.json", "[1]", "a.json entry 1 is int, not an object"),
        (
            "a.csv",
            "image,question,chosen,rejected\n0.png,What?,Yes, it is,No\n",
            "line 2 has more or fewer fields",
        ),
        ("a.parquet", "PAR1 but no Parquet", "a.parquet cannot be read as Parquet"),
        ("a.csv", 'image,chosen\n0.png,"open', "a.csv is not CSV after line 1"),
        ("a.jsonl", '{"question": "où?"}', "a.jsonl is not UTF-8"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(folder, load, name, text, said):
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError, match=said):
        load()


def test_one_split_in_two_formats_needs_a_choice(folder, load):
    datasets.Dataset.from_list([plain(0)]).to_parquet(folder / "train.parquet")
    for name in ("train.jsonl", "test.jsonl"):
        write_lines(folder / name, [plain(1)])
    with pytest.raises(RequestError, match=r"train\.jsonl, train\.parquet are one split in two formats"):
        load()


def test_two_data_files_need_a_choice(folder, load):
    write_lines(folder / "a.jsonl", [plain(number) for number in range(4)])
    write_lines(folder / "b.jsonl", [plain(number) for number in range(8)])
    with pytest.raises(RequestError, match=r"holds a\.jsonl, b\.jsonl: set data\.rows"):
        load()
    assert len(load(rows="b.jsonl", test_fraction=0.25)) == 6
    write_lines(folder / "pairs.jsonl", [plain(number) for number in range(4)])  # as task=mine does beside others
    assert len(load(test_fraction=0.25)) == 3


@pytest.mark.parametrize(("key", "value"), [("folder", "no/such"), ("rows", "c.jsonl")])
def test_a_missing_file_or_folder_is_named(load, key, value):
    with pytest.raises(RequestError, match=f"data.{key}={value}"):
        load(**{key: value})


# The Hub's datasets, from local copies


def rlaif_v_rows(folder: Path, count: int) -> datasets.Dataset:
    """Rows as on the Hub."""
    rows = [
        {
            "images": [{"bytes": (folder / f"{index % 9}.png").read_bytes(), "path": f"{index % 9}.png"}],
            **NORMAL,
            "prompt": [user(f"What is {index}?")],
            "problem": "",
        }
        for index in range(count)
    ]
    table = datasets.Dataset.from_list(rows, features=features()).remove_columns("problem")
    return table.cast_column("images", datasets.List(datasets.Image()))


@pytest.mark.parametrize("saved", [True, False], ids=["save_to_disk", "parquet"])
def test_a_local_copy_of_the_hubs(folder, tmp_path, monkeypatch, prepared, saved):
    save_image(folder / "1.png", "white")
    copy = tmp_path / "copy"
    splits = datasets.DatasetDict(train=rlaif_v_rows(folder, 50), test=rlaif_v_rows(folder, 10))
    save_image(folder / "1.png", "blue")
    if saved:
        splits.save_to_disk(copy)
    else:
        for name, rows in splits.items():
            rows.to_parquet(copy / f"{name}-00000-of-00001.parquet")
    monkeypatch.chdir(folder)  # its files have the names of the images in the rows, and must not stand in for them
    train, test = (prepared(hub, split, id=str(copy)) for split in ("train[:6%]", "test[:20%]"))
    assert (len(train), len(test)) == (3, 2)
    assert train[1]["prompt"] == [user("What is 1?")]
    assert train[1]["chosen"] == [assistant("A cat.")]
    assert [image.getpixel((0, 0)) for image in train[1]["images"]] == [(255, 255, 255)]


def test_a_bad_row_of_the_hubs_is_named(folder, tmp_path, prepared):
    image = {"bytes": (folder / "3.png").read_bytes(), "path": "3.png"}
    texts = ["not JSON"] + [json.dumps({"question": "What is it?", **ANSWERS})] * 49
    table = datasets.Dataset.from_list([{"image": image, "text": text, "idx": 0} for text in texts])
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "copy")
    train = prepared(hub, "train", id=str(tmp_path / "copy"), test="train[98%:]")
    assert train[0]["problem"] == "`text` is not a JSON object with question, chosen and rejected"
    assert {key: train[1][key] for key in NORMAL} == NORMAL
    assert train[1]["images"][0].getpixel((0, 0)) == (60, 0, 0)


def test_mmpr_from_local_files(folder, tmp_path, prepared):
    rows = [plain(number, question=f"<image>\nWhat is {number}?", extra=1) for number in range(10)]
    write_lines(tmp_path / "part.jsonl", [*rows, plain(3, image="../secret.png")])
    places = {"annotations": str(tmp_path / "part.jsonl"), "images": str(folder)}
    train, test = (prepared(mmpr, split, test_fraction=0.2, **places) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 3)
    good = [row for row in [*train, *test] if not row["problem"]]
    assert len(good) == 10
    for row in good:
        number = int(text_of(row["chosen"])[6])
        assert row["prompt"] == [user(f"What is {number}?")]
        assert row["images"][0].getpixel((0, 0)) == (20 * number, 0, 0)


@pytest.mark.parametrize(
    ("text", "change", "said"),
    [
        ("{}", {"annotations": "no.jsonl"}, r"data\.annotations=no\.jsonl: there is no such file"),
        ("{}", {"images": "nowhere"}, r"data\.images=nowhere: there is no such folder"),
        ('{"image": "a.png"}\n', {}, r"part\.jsonl has no column"),
        ("{not json\n", {}, r"part\.jsonl is not JSONL"),
    ],
)
def test_mmpr_names_what_it_cannot_use(folder, tmp_path, text, change, said):
    (tmp_path / "part.jsonl").write_text(text)
    places = {"annotations": str(tmp_path / "part.jsonl"), "images": str(folder), **change}
    with pytest.raises(RequestError, match=said):
        mmpr.load(mmpr.Config(**places), "train")


@pytest.mark.parametrize(
    ("id", "split", "said"),
    [
        ("./nowhere", "train", "no such folder"),
        ("copy", "tset", "no split tset, but train"),
        ("copy", "train", "has the columns prompt. Expected"),
    ],
)
def test_an_unusable_local_copy(tmp_path, monkeypatch, id, split, said):
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk("copy")
    with pytest.raises(RequestError, match=said):
        hub.load(hub.Config(id=id, test="train"), split)


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", range(10)), ("train[:20%]", [0, 1]), ("test[8:]", [8, 9]), ("train[:1]+test[-1:]", [0, 9])],
)
def test_slices_are_those_of_load_dataset(split, expected):
    splits = {name: datasets.Dataset.from_dict({"n": range(10)}) for name in ("train", "test")}
    assert list(select_split(splits, split)["n"]) == list(expected)


# data=photos


def test_the_photos(prepared):
    train, test = (prepared(photos, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (14, 4)
    for row in [*train, *test]:
        assert row["problem"] == ""
        assert row["images"][0].mode == "RGB"
        assert max(row["images"][0].size) == 384
        assert text_of(row["chosen"]) != text_of(row["rejected"])


def test_every_photo_is_used_credited_and_on_one_side_only():
    train, test = ({row["image"] for row in read_lines(photos.FOLDER / f"{name}.jsonl")} for name in ("train", "test"))
    credits = (photos.FOLDER / "CREDITS.md").read_text(encoding="utf-8")
    shipped = {path.name for path in photos.FOLDER.glob("*.jpg")}
    assert train | test == shipped
    assert not train & test
    assert all(f"| `{name}` |" in credits for name in shipped)
    assert sum(path.stat().st_size for path in photos.FOLDER.iterdir()) < 600_000


# conf/data


@pytest.mark.parametrize("name", ["amber", "coco", "files", "hub", "mmpr", "photos", "pope"])
def test_the_yaml_names_its_source_and_opens_with_its_command(name):
    text = (CONF / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    assert OmegaConf.create(text).source == name
    assert f"data={name}" in text.splitlines()[0]
