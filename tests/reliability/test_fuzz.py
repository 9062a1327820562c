"""Rows, images and commands that nobody thought of: whatever they are, the answer is a result or an error of ours."""

import io
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvlm_exp.config.schema import every_key
from smolvlm_exp.data.images import FORMATS, ImageError, ImageLimits, prepare_image
from smolvlm_exp.data.sources.files import to_row
from smolvlm_exp.data.truth import TRUTH_COLUMNS
from smolvlm_exp.data.validation import RowValidator, prepare_row
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose
from tests.reliability.test_bad_rows import encoded

LIMITS = ImageLimits(max_pixels=10**6, max_image_mib=1)
QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


WORDS = st.sampled_from(
    ["image", "images", "question", "prompt", "chosen", "rejected", "messages", "conversations", "rejected_response",
     "system", "role", "from", "content", "value", "type", "text", "user", "assistant", "gpt", "<image>", "good.png",
     "kind", "answer", "objects", "yes_no", "yes", "-1.5",
     "<end_of_utterance>", "..", "http://a/b", "path", "bytes", "\ud800", "\0"]
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.text(max_size=8), st.binary(max_size=4)
)
VALUES = st.recursive(LEAVES, lambda c: st.lists(c, max_size=3) | st.dictionaries(WORDS, c, max_size=4), max_leaves=8)
COLUMNS = ("image", "images", "question", "prompt", "chosen", "rejected", "messages", "conversations", "system")
CELLS = VALUES | st.just("good.png") | st.text(max_size=9)
ROWS = st.fixed_dictionaries({}, optional=dict.fromkeys((*COLUMNS, *TRUTH_COLUMNS), CELLS))


@pytest.fixture(scope="module")
def examiner(processor):
    return RowValidator(processor, 200, "report")


def test_any_row(examiner, tmp_path_factory):
    tries(examiner, tmp_path_factory.mktemp("rows"), 80)


@pytest.mark.slow
def test_very_many_rows(examiner, tmp_path_factory):
    tries(examiner, tmp_path_factory.mktemp("rows"), 1_000)


def tries(examiner, folder, examples):
    from datasets import Dataset

    from smolvlm_exp.data.messages import features

    (folder / "good.png").write_bytes(encoded("PNG"))
    columns, seen = features(), {"good": 0, "bad": 0}

    @settings(max_examples=examples, **QUIET)
    @given(ROWS)
    def one(row):
        made = to_row(row, folder)
        made = {name: made[name] for name in columns}
        stored = Dataset.from_list([made], features=columns).with_format("arrow")[0].to_pylist()[0]
        prepared = {**stored, **prepare_row(stored, 64, LIMITS, examiner.controls)}
        problem = examiner(prepared)["problem"]
        seen["bad" if problem else "good"] += 1

    one()
    assert seen["bad"] > examples // 2
    print(seen)


SEEDS = [
    encoded(format, (24, 16), mode)
    for format, mode in [
        ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "1"), ("JPEG", "RGB"), ("JPEG", "L"),
        ("JPEG", "CMYK"), ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "F"), ("TIFF", "I"), ("TIFF", "CMYK"),
        ("PPM", "RGB"),
    ]
]  # fmt: skip


def test_any_image():
    damage(300)


@pytest.mark.slow
def test_very_many_images():
    damage(20_000)


def damage(examples):
    """Valid files with bytes changed, cut out, put in and cut off."""
    seen = {"read": 0, "refused": 0}

    @settings(max_examples=examples, **QUIET)
    @given(
        st.sampled_from(SEEDS),
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(min_size=1, max_size=4)), max_size=6),
    )
    def one(data, changes):
        data = bytearray(data)
        for where, kind, value in changes:
            at = int(where * (len(data) - 1)) if data else 0
            cut = {0: slice(at, at + len(value)), 1: slice(at, at), 2: slice(at, at + len(value)), 3: slice(at, None)}
            data[cut[kind]] = value if kind < 2 else b""
        try:
            found, (width, height) = prepare_image(bytes(data), 32, LIMITS)
        except ImageError:
            seen["refused"] += 1
            return
        seen["read"] += 1
        image = Image.open(io.BytesIO(found))
        image.load()
        assert (image.mode, image.size) == ("RGB", (width, height))
        assert 1 <= max(width, height) <= 32
        assert image.format in FORMATS

    one()
    assert min(seen.values()) > examples // 20
    print(seen)


KEYS = every_key()
GROUPS = ["", "model", "data", "quant", "experiment", "tuned", "hydra/launcher", "hydra.sweeper", "hydra.callbacks"]
MISSPELT = [key + "x" for key in KEYS[::5]]
SAID = st.one_of(
    st.sampled_from(
        ["null", "true", "[]", "{}", "[1,2]", "{a: 1}", "???", "nan", "inf", "-1", "0", "1e400", "''", "$", "a b"]
    ),
    st.integers().map(str),
    st.floats().map(lambda x: "nan" if math.isnan(x) else repr(x)),
    st.text(max_size=12),
)


def test_any_command():
    commands(8)


@pytest.mark.parametrize(
    "override",
    ["=null", "model=null", "+quant=null", "experiment=null", "model=[tiny,tiny]", "hydra.sweeper.params={a: 1}",
     "hydra.sweeper.params=${oc.env:HOME}", "hydra/launcher=3", "hydra.sweeper=null",
     "~hydra.launcher", "hydra.run=null", "hydra.job=null"],
)  # fmt: skip
def test_commands_that_hydra_trips_over(override):
    """Each was a traceback of Hydra's own once."""
    with pytest.raises(
        RequestError,
        match=r"no such|one option of|not the name|must map settings|required by Hydra|not Optional|support deletion",
    ):
        compose(override)


@pytest.mark.slow
def test_very_many_commands():
    commands(300)


def commands(examples):
    seen = {"taken": 0, "refused": 0}
    keys = st.sampled_from(KEYS) | st.sampled_from(GROUPS) | st.sampled_from(MISSPELT) | st.text(max_size=8)

    @settings(max_examples=examples, **QUIET)
    @given(st.lists(st.tuples(st.sampled_from(["", "+", "++", "~"]), keys, SAID), min_size=1, max_size=3))
    def one(overrides):
        try:
            compose(*(f"{sign}{key}={value}" for sign, key, value in overrides))
            seen["taken"] += 1
        except RequestError:
            seen["refused"] += 1

    one()
    assert seen["refused"]
    print(seen)
