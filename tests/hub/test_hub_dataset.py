"""data=hub against a Hub on loopback: what is fetched, what is read, and what is said where it cannot be."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.repository import commit_of
from smolvlm_exp.data.sources import hub as source
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.hub import is_offline
from tests.hub.conftest import log_in

ANSWERS = {"chosen": "A cat.", "rejected": "A dog."}


def png(number: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.effect_noise((48, 48), 80 + number % 7).convert("RGB").save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


def rows(count: int, start: int = 0, **more: Any) -> datasets.Dataset:
    made = [{"image": png(n), "question": f"What is {n}?", **ANSWERS, **more} for n in range(start, start + count)]
    return datasets.Dataset.from_list(made).cast_column("image", datasets.Image())


def publish(hub: Any, id: str, files: dict[str, datasets.Dataset], row_group: int = 10, card: str = "") -> Path:
    folder = hub.root / "datasets" / id
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / name, batch_size=row_group)
    (folder / "README.md").write_text(card or "---\nlicense: cc-by-nc-4.0\n---\n")
    return folder


def load(split: str = "train", **settings: Any) -> datasets.Dataset:
    """As the next process does."""
    commit_of.cache_clear()
    return source.load(source.Config(source="hub", **{"id": "some/pairs", "test": "train[:1]", **settings}), split)


def questions(rows: datasets.Dataset) -> list[str]:
    return [text_of(row) for row in rows["prompt"][:]]


def test_a_slice_fetches_the_files_and_row_groups_that_hold_it(hub):
    """Of 3 files of 100 rows and a test file."""
    names = [f"data/train-0000{n}-of-00003.parquet" for n in range(3)]
    files = {name: rows(100, 100 * n) for n, name in enumerate(names)}
    folder = publish(hub, "some/pairs", {**files, "data/test-00000-of-00001.parquet": rows(20)})
    sizes = {name: (folder / name).stat().st_size for name in files}

    assert questions(load("test")) == [f"What is {n}?" for n in range(20)]
    read = hub.sent.copy()
    assert all(read[name] < 0.7 * sizes[name] for name in names), "footers alone"

    few = load("train[95:105]")
    assert questions(few) == [f"What is {n}?" for n in range(95, 105)]
    assert few[0]["images"][0]["bytes"].startswith(b"\x89PNG")
    assert hub.sent[names[2]] == read[names[2]], "the third file has none of these rows"

    assert questions(load("train[98:200]")) == [f"What is {n}?" for n in range(98, 200)]
    asked = len(hub.requests)
    assert len(load("train[98:200]")) == 102
    again = hub.requests[asked:]
    assert not [request for request in again if "parquet" in request], "what is here is not fetched again"


def test_what_was_fetched_is_there_without_the_hub(hub, caplog):
    publish(hub, "some/pairs", {"data/train-00000-of-00001.parquet": rows(40)})
    online = load("train[:5]")
    commit = source.provenance(source.Config(source="hub", id="some/pairs")).commit
    hub.faults.append(("", "drop"))
    is_offline.cache_clear()
    assert questions(load("train[:5]")) == questions(online)
    assert f"commit {commit[:8]}" in caplog.text
    with pytest.raises(RequestError, match=r"of it are not on this disk, and the Hub cannot be reached"):
        load("train[20:]")
    with pytest.raises(RequestError, match=r"data\.id=other/pairs: it is not on this disk"):
        load(id="other/pairs")


def test_a_silent_hub_is_noticed_once(hub, monkeypatch):
    hub.faults.append(("", "silent"))
    monkeypatch.setattr("smolvlm_exp.utils.hub.PING_SECONDS", 0.3)
    for _ in range(2):
        with pytest.raises(RequestError, match="the Hub cannot be reached"):
            load()
    assert hub.requests == ["HEAD "]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("drop", "the connection to the Hub broke off"),
        ("cut", "the connection to the Hub broke off"),
        (500, "the Hub answers HTTP 500"),
    ],
)
def test_a_hub_that_fails_in_the_middle_is_readable_and_what_arrived_is_kept(hub, monkeypatch, fault, said):
    names = [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]
    publish(hub, "some/pairs", {name: rows(30, 30 * n) for n, name in enumerate(names)})
    load("train[:1]")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the clients' own tries
    hub.faults.append((f"GET .*resolve.*{names[1]}", fault))
    with pytest.raises(RequestError, match=rf"data\.id=some/pairs: {said}"):
        load()
    hub.faults.clear()
    sent = hub.sent[names[0]]
    assert len(load()) == 60
    assert hub.sent[names[0]] == sent


def test_who_may_read_what(hub, monkeypatch):
    publish(hub, "some/pairs", {"train.parquet": rows(20), "test.parquet": rows(5)})
    hub.private.add("datasets/some/pairs")
    with pytest.raises(RequestError, match=r"or it is private and your token does not reach it.*hf auth login"):
        load()
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    with pytest.raises(RequestError, match="the Hub refuses your token"):
        load()
    log_in(monkeypatch, hub)
    assert len(load()) == 20
    hub.gated.add("datasets/some/pairs")
    with pytest.raises(
        RequestError, match=r"it is gated\. Accept its conditions at https://huggingface.co/datasets/some/pairs"
    ):
        load()
    log_in(monkeypatch, hub, accepted=True)
    assert len(load()) == 20


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"id": "HuggingFaceH4/rlaif-v_formated"}, "Did you mean HuggingFaceH4/rlaif-v_formatted?"),
        ({"id": "rlaif"}, "a dataset of the Hub is named OWNER/NAME"),
        ({"id": "./pairs"}, "there is no such folder"),
        ({"revision": "v9"}, "it has no branch, tag or commit v9"),
        ({"train": "validation"}, "has no split validation. It has train, test"),
        ({"test": "tset"}, "has no split tset. It has train, test"),
        ({"split": "train[:x]"}, "or a slice such as"),
        ({"split": "train[:0]"}, "split train[:0] has no rows"),
        ({"config_name": "other"}, "'other' not found"),
        ({"rows": "*.csv"}, "No (supported) data files found in some/pairs"),
        ({"columns": {"captoin": "answer"}}, "data.columns: data.id=some/pairs has no column captoin; it has chosen"),
        ({"columns": {"rejected": None, "chosen": None}}, "Other names are told by data.columns"),
    ],
)
def test_what_is_not_there_is_named(hub, settings, said):
    publish(hub, "some/pairs", {"train.parquet": rows(20), "test.parquet": rows(5)})
    with pytest.raises(RequestError) as error:
        load(**{"split": "train", **settings})
    assert said in str(error.value)
    assert len(str(error.value)) < 600


MESSAGES = {
    "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]}],
    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
    "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}],
}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"image": 1, "question": "What is it?", **ANSWERS, "ds_name": "x", "origin_split": "{}"}, {}),  # RLAIF-V
        ({"images": [1], **MESSAGES}, {}),  # HuggingFaceH4, trl-lib
        ({"image": 1, "text": json.dumps({"question": "What is it?", **ANSWERS}), "idx": 0}, {}),  # RLHF-V
        ({"jpg": 1, "instruction": "What is it?", "good": "A cat.", "bad": "A dog."},
         {"jpg": "image", "instruction": "question", "good": "chosen", "bad": "rejected"}),
        ({"image": 1, "question": "?", "asked": "What is it?", **ANSWERS}, {"asked": "question"}),
    ],
    ids=["RLAIF-V", "messages", "RLHF-V", "own names", "a name that is taken"],
)  # fmt: skip
def test_every_spelling_gives_the_same_rows(hub, row, columns):
    row = {name: png(0) if value == 1 else [png(0)] if value == [1] else value for name, value in row.items()}
    publish(hub, "some/pairs", {"train.parquet": datasets.Dataset.from_list([row] * 4)})
    made = load(columns=columns)
    assert len(made) == 4
    for name, messages in MESSAGES.items():
        assert made[0][name] == messages
    assert not any(made["problem"][:])


def test_truths_and_images_held_out_where_there_is_no_test(hub):
    """As VQA sets have them: several questions to an image, an answer or ten of them."""
    images = [png(n) for n in range(20)]
    table = datasets.Dataset.from_list(
        [
            {"image": images[n % 20], "question": f"How many in {n}?", "multiple_choice_answer": "two",
             "answers": [{"answer": "two", "answer_id": 1}, {"answer": "2", "answer_id": 2}]}
            for n in range(60)
        ]
    )  # fmt: skip
    publish(
        hub, "some/vqa", {"data/train-00000-of-00001.parquet": table, "data/validation-00000-of-00001.parquet": table}
    )
    given = {"id": "some/vqa", "columns": {"multiple_choice_answer": "answer"}, "train": "train[:50]", "test": "test"}
    train, test = load("train[:50]", **given), load("test", **given)
    assert len(train) + len(test) == 50
    assert {row["images"][0]["bytes"] for row in train}.isdisjoint({row["images"][0]["bytes"] for row in test})
    assert json.loads(train[0]["truth"]) == {"kind": "answer", "answer": "two"}
    assert (text_of(train[0]["chosen"]), "rejected" in train.column_names) == ("two", False)  # for trainer=sft
    several = load("validation", **{**given, "columns": {"answers": "answer"}, "test": "validation"})
    assert json.loads(several[0]["truth"]) == {"kind": "answer", "answer": ["two", "2"]}
    assert text_of(several[0]["chosen"]) == "two"


def test_configurations_revisions_and_files_of_ones_choice(hub):
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*.parquet\n" for name in ("a", "b")
    )
    folder = publish(hub, "some/pairs", {"a/x.parquet": rows(20), "b/x.parquet": rows(20, 50)}, card=card + "---\n")
    assert questions(load("train[:1]", config_name="b")) == ["What is 50?"]
    assert questions(load("train[:1]", rows="b/*")) == ["What is 50?"]
    assert questions(load("train[-1:]", rows=["a/x.parquet", "b/x.parquet"])) == ["What is 69?"]
    with pytest.raises(RequestError, match="Config name is missing"):
        load()
    old = hub.root / "old"
    old.mkdir()
    rows(3, 7).to_parquet(old / "train.parquet")
    hub.revisions["datasets/some/pairs"] = {"v1": old}
    assert questions(load(revision="v1")) == ["What is 7?", "What is 8?", "What is 9?"]
    assert folder.is_dir()


@pytest.mark.parametrize("kind", ["jsonl", "imagefolder"])
def test_other_files_than_parquet(hub, kind):
    folder = publish(hub, "some/pairs", {})
    lines = []
    for n in range(6):
        line = {"question": f"What is {n}?", **ANSWERS}
        if kind == "imagefolder":
            (folder / "train").mkdir(exist_ok=True)
            (folder / "train" / f"{n}.png").write_bytes(png(n)["bytes"])
            line["file_name"] = f"{n}.png"
        else:
            line["image"] = f"images/{n}.png"
        lines.append(json.dumps(line) + "\n")
    (folder / ("train/metadata.jsonl" if kind == "imagefolder" else "train.jsonl")).write_text("".join(lines))
    made = load("train[:4]")
    assert len(made) == 4
    if kind == "imagefolder":
        assert made[0]["images"][0]["bytes"].startswith(b"\x89PNG")
    else:
        assert "only names it" in made[0]["problem"]


def test_a_card_that_names_files_elsewhere(hub, tmp_path):
    publish(hub, "other/pairs", {"train.parquet": rows(3)})
    card = "---\nconfigs:\n- config_name: default\n  data_files: hf://datasets/other/pairs/train.parquet\n---\n"
    publish(hub, "some/pairs", {"train.parquet": rows(3)}, card=card)
    with pytest.raises(RequestError, match="Data files don't belong to some/pairs"):
        load()
    rows(3).to_parquet(tmp_path / "private.parquet")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../private.parquet\n---\n")
    with pytest.raises(RequestError, match="lies outside of the repository"):
        load(id=str(copy))


def test_where_the_rows_come_from(hub):
    folder = publish(hub, "some/pairs", {"train.parquet": rows(3)})
    config = source.Config(source="hub", id="some/pairs")
    first = source.provenance(config)
    assert first.license == "cc-by-nc-4.0"
    rows(4).to_parquet(folder / "train.parquet")
    assert source.provenance(config) == first, "all rows of a run are of one commit, whatever is published meanwhile"
    commit_of.cache_clear()
    second = source.provenance(config)
    assert (len(first.commit), first.commit == second.commit) == (40, False)
    assert len(load(test="train")) == 4
