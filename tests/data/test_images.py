"""Images of every kind come out as a person sees them. Broken files: tests/reliability/test_bad_rows.py."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from smolvlm_exp.data.images import ImageError, ImageLimits, locate, prepare_image, shrink, to_rgb
from smolvlm_exp.data.validation import prepare_row

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def prepared(data: bytes, max_edge: int = 512) -> Image.Image:
    """One image's bytes prepared and decoded again, after checking what is always true of them."""
    data, size = prepare_image(data, max_edge)
    image = Image.open(io.BytesIO(data))
    assert (image.mode, image.size) == ("RGB", size)
    return image


def row_of(*entries: dict | None, max_edge: int = 512, **columns) -> dict:
    return prepare_row({"images": list(entries), "prompt": [], **columns}, max_edge, ImageLimits(), [])


def problem(entry: dict | None) -> str:
    row = row_of(entry)
    assert row["images"] == row["sizes"] == row["image_sha256"] == []
    return row["problem"]


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    """Of its first row."""
    return [image.getpixel((x, 0)) for x in range(image.width)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_bytes_that_are_fine_stay(format):
    data = encoded(noise(40, 30), format)
    assert row_of({"bytes": data, "path": "name.jpg"}, max_edge=40) == {
        "images": [{"bytes": data, "path": None}],
        "image_sha256": [hashlib.sha256(data).digest()],
        "sizes": [[40, 30]],
        "prompt": [],
        "problem": "",
    }


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    # The image is 4 x 2 with its top left pixel red; where that pixel is to be seen follows from the EXIF standard.
    [(1, (4, 2), (0, 0)), (2, (4, 2), (3, 0)), (3, (4, 2), (3, 1)), (6, (2, 4), (1, 0)), (8, (2, 4), (0, 3))],
)
def test_exif_orientation_is_applied(orientation, size, corner):
    image = Image.new("RGB", (4, 2), "blue")
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = prepared(encoded(image, exif=exif))
    assert upright.size == size
    assert upright.getpixel(corner) == RED
    assert upright.getexif().get(0x0112, 1) == 1  # or a later reader would turn it once more


@pytest.mark.parametrize(
    ("mode", "clear", "half", "expected"),
    [("RGBA", (0, 0, 0, 0), (255, 0, 0, 128), (255, 127, 127)), ("LA", (0, 0), (0, 128), (127, 127, 127))],
)
def test_alpha_is_laid_over_white(mode, clear, half, expected):
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), half)
    assert pixels(prepared(encoded(image))) == [WHITE, expected]


@pytest.mark.parametrize(
    ("mode", "format", "clear"), [("P", "PNG", 0), ("P", "GIF", 0), ("RGB", "PNG", (1, 2, 3))], ids=str
)
def test_one_transparent_colour_is_white(mode, format, clear):
    image = Image.new(mode, (2, 1), clear)
    if mode == "P":
        image.putpalette([0, 0, 255, *RED])
    image.putpixel((1, 0), 1 if mode == "P" else RED)
    assert pixels(prepared(encoded(image, format, transparency=clear))) == [WHITE, RED]


@pytest.mark.parametrize(
    ("dtype", "white", "format"),
    [(np.uint16, 65_535, "PNG"), (np.uint16, 65_535, "TIFF")]
    + [(np.float32, white, "TIFF") for white in (1.0, 255.0, 65_535.0, 1e6)]
    + [(np.int32, white, "TIFF") for white in (255, 65_535, 2**31 - 1)],
)
def test_wide_pixels_keep_their_brightness(dtype, white, format):
    image = Image.fromarray(np.array([[0, white / 2, white]], dtype=dtype))
    black, grey, full = (pixel[0] for pixel in pixels(prepared(encoded(image, format))))
    assert (black, grey, full) == (0, pytest.approx(128, abs=1), 255)


def test_a_dark_sixteen_bit_image_stays_dark():
    image = Image.fromarray(np.full((2, 2), 200, dtype=np.uint16))
    assert prepared(encoded(image)).getpixel((0, 0)) == (1, 1, 1)


def test_float_tiff_with_holes_and_overshoot():
    image = Image.fromarray(np.array([[np.nan, -0.1, 0.5, 1.02]], dtype=np.float32))
    assert [pixel[0] for pixel in pixels(to_rgb(image))] == [0, 0, 128, 255]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RED),
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("1", (8, 8), 1), WHITE),
        (Image.new("YCbCr", (8, 8), (255, 128, 128)), WHITE),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_other_colour_models(image, expected):
    assert prepared(encoded(image, "TIFF")).getpixel((0, 0)) == expected


@pytest.mark.parametrize("format", ["WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG"])
def test_other_formats_become_png(format):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0)) if format == "JPEG" else Image.new("RGB", (8, 8), RED)
    image = prepared(encoded(red, format))
    assert image.format == "PNG"
    assert image.getpixel((4, 4)) == pytest.approx(RED, abs=4)


@pytest.mark.parametrize(
    ("size", "expected"), [((1024, 300), (512, 150)), ((300, 1024), (150, 512)), ((3000, 2), (512, 1))]
)
def test_the_long_edge_is_shrunk(size, expected):
    assert prepared(encoded(Image.new("RGB", size))).size == expected


def test_shrinking_is_lanczos_and_leaves_the_original_alone():
    original = noise(100, 50)
    assert shrink(original, 100) is original
    recipe = original.copy()
    recipe.thumbnail((32, 32), Image.Resampling.LANCZOS)
    assert shrink(original, 32).tobytes() == recipe.tobytes()
    assert original.size == (100, 50)


def test_the_pixel_limit_does_not_depend_on_pillow_settings(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some libraries leave it
    with pytest.raises(ImageError, match=r"more than data\.max_pixels=99 pixels"):
        prepare_image(encoded(Image.new("RGB", (10, 10))), 512, ImageLimits(max_pixels=99))


def test_the_reason_is_the_same_in_every_run():
    reason = problem({"bytes": b"no image at all", "path": None})
    assert reason.startswith("image 1 cannot be decoded: it is none of JPEG, PNG")
    assert "0x" not in reason  # Pillow's own message holds the address of a buffer


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (None, "image 1 is empty"),
        ({"bytes": b"", "path": None}, "image 1 is empty"),
        ({"bytes": None, "path": "http://host/cat.jpg"}, "image 1 is a URL; download it first: http://host/cat.jpg"),
        ({"bytes": None, "path": "zip://a.png::b.zip"}, "image 1 is a URL; download it first: zip://a.png::b.zip"),
        ({"bytes": None, "path": "no/such.png"}, "image 1 is not there: no/such.png"),
        ({"bytes": None, "path": "/dev/zero"}, "image 1 is not there: /dev/zero"),
    ],
)
def test_unreadable_images_are_reported(entry, expected):
    assert problem(entry) == expected


def test_one_bad_image_makes_a_bad_row():
    fine, broken = {"bytes": encoded(Image.new("RGB", (2, 2))), "path": None}, {"bytes": b"x", "path": None}
    row = row_of(fine, broken)
    assert row["images"] == []
    assert row["problem"].startswith("image 2 cannot be decoded")


def test_a_row_without_images_keeps_its_problem():
    empty = {"images": [], "image_sha256": [], "sizes": [], "prompt": []}
    assert row_of(problem="from its source") == {**empty, "problem": "from its source"}
    assert row_of(images=None) == {**empty, "problem": ""}


def test_a_path_is_made_absolute_and_bytes_need_none(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"a")
    for name in ("sub/a.png", "./sub/../sub/a.png"):
        assert locate(name, tmp_path) == {"bytes": None, "path": str((tmp_path / "sub" / "a.png").resolve())}
    for entry in (b"x", {"bytes": b"x", "path": "../any.png"}):
        assert locate(entry, tmp_path) == {"bytes": b"x", "path": None}
    with pytest.raises(ImageError, match="lies outside the data's folder"):
        locate("sub/../../a.png", tmp_path)
