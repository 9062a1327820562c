"""P8: bad rows are found before training, and named by index, file and reason: each kind of defect, in real files."""

import io
import json
import os
import struct
import zlib
from types import SimpleNamespace

import pytest
from PIL import Image

from smolvlm_exp.data.messages import text_of, user
from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.data.sources.files import Config
from smolvlm_exp.data.tokens import WORD_JOINER, control_tokens, escape_control_tokens, escape_text
from smolvlm_exp.utils.errors import RequestError

GOOD = {"image": "good.png", "question": "What is it?", "chosen": "A star.", "rejected": "A moon."}


def encoded(format, size=(40, 30), mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, size, 7).save(buffer, format=format, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that says it is as large as that."""
    data = bytearray(encoded("PNG", (1, 1), "L"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def broken_crc(data):
    return data[:40] + bytes([data[40] ^ 255]) + data[41:]


def frames(format, mode="L"):
    images = [Image.effect_noise((20, 20), 50).convert(mode) for _ in range(3)]
    buffer = io.BytesIO()
    images[0].save(buffer, format=format, save_all=True, append_images=images[1:])
    return buffer.getvalue()


FILES = {  # what an image's file may be, and what is said of it
    "empty.png": (b"", "cannot be decoded"),
    "text.png": (b"no image at all", "none of JPEG"),
    "html.jpg": (b"<!DOCTYPE html><title>404 not found</title>", "a web page"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(90), "HEIC, as phones write it: save it as JPEG"),
    "half.jpg": (encoded("JPEG", (90, 90))[:400], "cannot be decoded"),
    "half.png": (encoded("PNG", (90, 90))[:70], "cannot be decoded"),
    "half.webp": (encoded("WEBP", (90, 90))[:40], "cannot be decoded"),
    "half.gif": (encoded("GIF", (90, 90), "P")[:30], "cannot be decoded"),
    "half.tiff": (encoded("TIFF", (90, 90))[:200], "cannot be decoded"),
    "half.bmp": (encoded("BMP", (90, 90))[:200], "cannot be decoded"),
    "flipped.png": (broken_crc(encoded("PNG", (90, 90))), "cannot be decoded"),
    "header_alone.png": (encoded("PNG")[:33], "cannot be decoded"),
    "header_alone.jpg": (b"\xff\xd8\xff\xe0", "cannot be decoded"),
    "zeros.jpg": (bytes(3000), "none of JPEG"),
    "bomb.png": (png_header(60_000, 60_000), "more than data.max_pixels=100,000,000"),
    "wide_bomb.png": (png_header(2**31 - 1, 1), "more than data.max_pixels=100,000,000"),
    "none.png": (png_header(0, 5), "cannot be decoded"),
    "large.png": (encoded("PNG") + bytes(2 * 2**20), "more than data.max_image_mib=1"),
    "figure.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "none of JPEG"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "none of JPEG"),
    "page.pdf": (b"%PDF-1.7\n1 0 obj\n", "none of JPEG"),
    "icon.ico": (encoded("ICO"), "none of JPEG"),
    "moving.gif": (frames("GIF"), "has several frames; data.first_frame=true"),
    "pages.tiff": (frames("TIFF"), "has several frames"),
    "moving.webp": (frames("WEBP", "RGB"), "has several frames"),
}
PATHS = {  # what may stand for an image
    "nowhere.png": "is not there: nowhere.png",
    "folder": "is not there: folder",
    "pipe": "is not there: pipe",
    "": "it has no image",
    "../outside.png": "lies outside the data's folder",
    "link.png": "lies outside the data's folder",
    "/etc/hostname": "lies outside the data's folder",
    "https://example.com/a.png": "is a URL; download it first",
    "file:///etc/hostname": "is a URL",
    "s3://bucket/a.png": "is a URL",
    "data:image/png;base64,AAAA": "none of JPEG",
    "data:image/png;base64,A": "is not valid base64",
    "data:text/plain,hello": "is a URL",
    "a\x00b.png": "cannot be read",
    "x" * 5000: "none of JPEG",  # it is base64, and no path is as long
    "-" * 5000: "cannot be read",
    "~root/a.png": "is not there",
}
ROWS = [  # what may be wrong with the rest of a row
    ({"image": None}, "it has no image"),
    ({"image": 7}, "image 1 is empty"),
    ({"image": []}, "it has no image"),
    ({"image": {"path": None}}, "image 1 is empty"),
    ({"image": {"bytes": [1, 2]}}, "has list where its bytes should be"),
    ({"image": ["good.png", None]}, "image 2 is empty"),
    ({"image": ["good.png", "good.png"], "question": "<image> What?"}, "2 images but its prompt names 1"),
    ({"question": "<image><image> What?"}, "1 images but its prompt names 2"),
    ({"question": None}, "`prompt` is empty"),
    ({"question": "   \n"}, "`prompt` is empty"),
    ({"question": [{"role": "user"}]}, "`prompt` is empty"),
    ({"question": [{"role": "robot", "content": "What?"}]}, "role is 'robot'"),
    ({"question": [{"role": ["user"], "content": "What?"}]}, "has an unknown form"),
    ({"question": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of type 'video'"),
    ({"question": [{"role": "user", "content": 4}]}, "should be a text or a list of parts"),
    ({"question": ["What?"]}, "a role and a content"),
    ({"question": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It"}]}, "ends with a turn"),
    ({"chosen": ""}, "`chosen` is empty"),
    ({"chosen": None}, "`chosen` is empty"),
    ({"chosen": "\t"}, "`chosen` is empty"),
    ({"chosen": float("nan")}, "`chosen` is empty"),
    ({"question": float("nan")}, "`prompt` is empty"),
    ({"chosen": True}, "is true; write it as the text"),
    ({"chosen": {"text": "A star."}}, "role is None"),
    ({"chosen": [{"role": "user", "content": "A star."}]}, "`chosen` has the role user"),
    ({"chosen": "A star.<image>"}, "`chosen` has an image, or <image>, in it"),
    ({"chosen": "A star.<end_of_utterance>"}, "contains <end_of_utterance>"),
    ({"chosen": "A \ud800 star."}, "half a character"),
    ({"rejected": ""}, "`rejected` is empty"),
    ({"rejected": "A star."}, "`chosen` and `rejected` are the same"),
    ({"rejected": " A star.  "}, "`chosen` and `rejected` are the same"),
    ({"rejected": "<|im_end|> no"}, "contains <|im_end|>"),
    ({"answer": {"text": "A star."}}, "`answer` is {'text': 'A star.'}, not a text"),
    ({"truth": '{"kind": "yes_no"}'}, "`truth` is no truth of kind yes_no"),
    ({"answer": "A \ud800 star."}, "half a character"),
    ({"question": "What is it? " * 200}, "the prompt alone is"),
    ({"rejected": "No star at all. " * 200}, "tokens past data.max_length=300"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    folder = root / "mine"
    (folder / "folder").mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    (root / "outside.png").write_bytes(encoded("PNG"))
    (folder / "link.png").symlink_to(root / "outside.png")
    (folder / "good.png").write_bytes(encoded("PNG"))
    for name, (data, _) in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def bad_rows():
    yield from (({**GOOD, "image": name}, said) for name, (_, said) in FILES.items())
    yield from (({**GOOD, "image": path}, said) for path, said in PATHS.items())
    yield from (({**GOOD, **change}, said) for change, said in ROWS)


def write(folder, rows, name="train.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps(GOOD) + "\n")


def config(folder, **changes):
    limits = {"max_length": 300, "on_long_answer": "report", "max_image_mib": 1}
    return Config(source="files", folder=str(folder), **{**limits, **changes})


def test_every_kind_of_defect_is_named(folder, processor, tmp_path, capsys):
    """Good rows between bad ones; the bad are told with their line, their file and why, and the good are kept."""
    bad = list(bad_rows())
    assert len(bad) >= 70
    write(folder, [each for row, _ in bad for each in (GOOD, row)])
    found = load_preferences(config(folder, on_bad_row="skip", max_bad_rows=0.6), processor, tmp_path)
    assert len(found.train) == len(bad)
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").read_text().splitlines()]
    assert [each["row"] for each in listed] == list(range(1, 2 * len(bad), 2))
    missed = [(said, each) for (_, said), each in zip(bad, listed, strict=True) if said not in each["reason"]]
    assert missed == []
    for each in listed:
        assert each["split"] == "train"
        assert each["from"] == f"train.jsonl line {each['row'] + 1}"
    assert f"{len(bad)} bad rows skipped" in capsys.readouterr().out
    print(f"{len(bad)} kinds of bad rows")


def test_they_stop_the_run_unless_they_are_to_be_skipped(folder, processor, tmp_path):
    write(folder, [GOOD, {**GOOD, "image": "half.png"}, {**GOOD, "chosen": ""}])
    with pytest.raises(RequestError) as refusal:
        load_preferences(config(folder), processor, tmp_path)
    told = str(refusal.value)
    assert "2 bad rows in data=files" in told
    assert "train row 1 (train.jsonl line 2): image 1 cannot be decoded" in told
    assert "train row 2 (train.jsonl line 3): `chosen` is empty" in told
    assert not (tmp_path / "skipped_rows.jsonl").exists()


def test_skipping_has_a_ceiling(folder, processor, tmp_path):
    write(folder, [GOOD, GOOD, GOOD, {**GOOD, "chosen": ""}])
    with pytest.raises(RequestError, match=r"1 of 4 train rows are bad, more than data\.max_bad_rows=0\.2:"):
        load_preferences(config(folder, on_bad_row="skip"), processor, tmp_path)
    assert (tmp_path / "skipped_rows.jsonl").read_text().count("\n") == 1
    load_preferences(config(folder, on_bad_row="skip", max_bad_rows=0.25), processor, tmp_path)


def test_the_first_frame_by_option(folder, processor, tmp_path):
    write(folder, [{**GOOD, "image": name} for name in ("moving.gif", "pages.tiff", "moving.webp")])
    found = load_preferences(config(folder, first_frame=True), processor, tmp_path)
    assert [row["images"][0].size for row in found.train] == [(20, 20)] * 3


def test_control_tokens_typed_in_a_question_are_text(folder, processor, model, tmp_path):
    """They keep their letters, and the model reads none of them as control, in training and in generation."""
    from smolvlm_exp.engine.inputs.dataset import PackedDataset
    from smolvlm_exp.evaluation.generate import left_padded, read_prompts

    typed = "Is <end_of_utterance> or <row_1_col_1> or <fake_token_around_image> in it?<|im_end|>"
    parts = [{"type": "image"}, {"type": "text", "text": f"{typed} <image>"}]
    write(folder, [{**GOOD, "question": typed}, {**GOOD, "question": [{"role": "user", "content": parts}]}, GOOD])
    rows = load_preferences(config(folder), processor, tmp_path).train
    assert text_of(rows[0]["prompt"]).replace(WORD_JOINER, "") == typed
    assert text_of(rows[2]["prompt"]) == GOOD["question"]

    def controls(ids):
        return [i for i in ids if i in processor.tokenizer.added_tokens_decoder]

    ours = PackedDataset(rows, processor)
    plain = controls(ours[2]["prompt_ids"].tolist())
    assert plain
    assert controls(ours[0]["prompt_ids"].tolist()) == plain
    assert controls(ours[1]["prompt_ids"].tolist()) == plain
    asked = [{"images": [Image.new("RGB", (40, 30))], "prompt": [user(text)]} for text in (typed, "<image>", "What?")]
    first, second, third = (controls(ids.tolist()) for ids in left_padded(processor, asked)["input_ids"])
    padding = processor.tokenizer.pad_token_id
    assert [i for i in first if i != padding] == [i for i in third if i != padding]
    assert [i for i in second if i != padding] == [i for i in third if i != padding]
    first, second, third = (controls(prompt.ids.tolist()) for prompt in read_prompts(model, processor, asked))
    assert first == second == third == plain


def test_tokens_that_cannot_be_taken_apart_do_not_hang():
    """A foreign tokenizer may have any token: one of a single letter, or with a word joiner in it."""
    tokens = ("x", f"<{WORD_JOINER}", "<x>", f"<{WORD_JOINER}x>")
    tokenizer = SimpleNamespace(added_tokens_decoder=dict(enumerate(tokens)))
    controls = control_tokens(SimpleNamespace(tokenizer=tokenizer))
    assert controls == sorted(tokens[2:])
    text = escape_text("an <x> and x", controls)
    assert text.replace(WORD_JOINER, "") == "an <x> and x"
    assert not [control for control in controls if control in text]


def test_no_spelling_of_a_control_token_is_left(processor):
    controls = control_tokens(processor)
    for nasty in ("<<image>image>", "<image><image>", "".join(controls), "<|im_<|im_end|>end|>"):
        (message,) = escape_control_tokens([{"role": "user", "content": [{"type": "text", "text": nasty}]}], controls)
        text = message["content"][0]["text"]
        assert text.replace(WORD_JOINER, "") == nasty
        assert not [i for i in processor.tokenizer(text)["input_ids"] if i in processor.tokenizer.added_tokens_decoder]
