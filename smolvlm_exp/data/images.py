"""Any image a person may have -> the RGB image the processor should see.

One broken file among 80,000 must not stop a run: an ImageError becomes its row's problem, and `data.on_bad_row`
decides.
"""

import base64
import binascii
import io
import re
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow also opens EPS (it runs Ghostscript) and scientific containers: none of them is a photograph.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

FULL_SCALES = (1.0, 255.0, 65_535.0)  # white, in an image whose pixels are floats or wide integers

SHOWN = 200  # letters of a row's own that a message repeats
LONGEST_PATH = 4096  # letters, on Linux

Entry = dict[str, Any]  # {"bytes": bytes | None, "path": str | None}, as `datasets.Image(decode=False)` gives it


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost, checked before it is decoded; each is a setting of `data` by the same name."""

    max_pixels: int = 100_000_000  # 17 KB of PNG can claim ten times as many
    max_image_mib: int = 64
    first_frame: bool = False  # take the first of several frames, instead of refusing the image

    @classmethod
    def of(cls, data: Any) -> Self:
        """The limits in the group `data`."""
        return cls(data.max_pixels, data.max_image_mib, data.first_frame)


class ImageError(ValueError):
    """What is wrong with one image, worded to follow "image 1 "."""


def prepare_image(data: bytes, max_edge: int, limits: ImageLimits = ImageLimits()) -> tuple[bytes, tuple[int, int]]:
    """One image's bytes and (width, height) once it is RGB, upright and at most `max_edge` pixels on its long edge."""
    try:
        # Pillow warns about odd EXIF and the like, which does no harm here.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limits.max_pixels:
                raise Image.DecompressionBombError
            # n_frames only where there is no is_animated: counting frames reads each of perhaps a hundred thousand
            several = image.is_animated if hasattr(image, "is_animated") else getattr(image, "n_frames", 1) > 1
            if several and not limits.first_frame:
                raise ImageError("has several frames; data.first_frame=true takes the first of such images")
            image.load()
            prepared = shrink(to_rgb(image), max_edge)
            untouched = image.mode == "RGB" and prepared is image and image.format in ("JPEG", "PNG")
            return (data if untouched else as_png(prepared)), prepared.size
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"cannot be decoded: {unidentified(data)}") from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"cannot be decoded: it unpacks to more than data.max_pixels={limits.max_pixels:,} pixels"
        ) from None
    except Exception as error:  # decoders raise whatever they trip over: OSError, SyntaxError, struct.error, zlib.error
        raise ImageError(f"cannot be decoded: {error or type(error).__name__}") from error


def unidentified(data: bytes) -> str:
    """What bytes that are no image of ours seem to be."""
    if re.match(rb"\s*(<!doctype\s+)?<?html", data[:200], re.IGNORECASE):
        return "it is a web page, as a failed download leaves one"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "it is HEIC, as phones write it: save it as JPEG"
    return f"it is none of {', '.join(FORMATS)}, or is damaged"


def open_image(entry: Entry, max_edge: int, limits: ImageLimits) -> Image.Image:
    """A single image, prepared like a row's. Raises ImageError: what is wrong with it."""
    return Image.open(io.BytesIO(prepare_image(read_image_bytes(entry, limits), max_edge, limits)[0]))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as a person sees it: upright, on white where it is transparent, 8 bits per channel.

    An image that needs no change is returned itself, not a copy.
    """
    if image.getexif().get(0x0112, 1) in range(2, 9):  # EXIF orientation
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # I;16, I;16B, I, F
        return from_wide_pixels(image)
    if image.has_transparency_data:  # also of a palette, grey or RGB image with one transparent colour
        layer, white = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def from_wide_pixels(image: Image.Image) -> Image.Image:
    """Grey pixels of more than 8 bits -> RGB. Pillow's own conversion clips them at 255, which gives a white image.

    White is 65,535 in a 16-bit file. A file of 32-bit integers or floats does not say: there it is the smallest usual
    full scale that holds the brightest pixel (5% over counts as ringing from a resize), or that pixel itself.
    """
    wide = image if image.mode in ("I", "F") else image.convert("I")
    pixels = np.nan_to_num(np.asarray(wide, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    white = FULL_SCALES[-1]
    if image.mode in ("I", "F"):
        peak = float(pixels.max())
        scales = FULL_SCALES if image.mode == "F" else FULL_SCALES[1:]
        white = next((scale for scale in scales if peak <= scale * 1.05), peak)
    grey = np.clip(np.rint(pixels * (255.0 / white)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def shrink(image: Image.Image, max_edge: int) -> Image.Image:
    """At most `max_edge` pixels on the long edge, keeping the proportions; never enlarges. LANCZOS, like the recipe."""
    if max(image.size) <= max_edge:
        return image
    smaller = image.copy()  # `thumbnail` works in place
    smaller.thumbnail((max_edge, max_edge), Image.Resampling.LANCZOS)
    return smaller


def as_png(image: Image.Image) -> bytes:
    """Lossless bytes. Level 1 is about three times faster than the default and takes a tenth more disk."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def read_image_bytes(entry: Entry | None, limits: ImageLimits = ImageLimits()) -> bytes:
    """An image's bytes, from the row itself or from a local file; nothing is ever fetched."""
    if entry and entry["bytes"]:
        check_file_size(len(entry["bytes"]), limits)
        return entry["bytes"]
    path = entry["path"] if entry else None
    if not path:
        raise ImageError("is empty")
    refuse_url(path)
    try:
        if Path(path).is_file():  # neither a folder, nor a device or pipe that would never end
            check_file_size(Path(path).stat().st_size, limits)
            return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error}") from error
    raise ImageError(f"is not there: {path[:SHOWN]}")


def check_file_size(size: int, limits: ImageLimits) -> None:
    if size > limits.max_image_mib * 2**20:
        raise ImageError(f"is {size / 2**20:,.0f} MiB, more than data.max_image_mib={limits.max_image_mib}")


def locate(entry: Entry | str | bytes | None, folder: Path) -> Entry:
    """A row's image as {"bytes", "path"}, with an absolute path.

    Rows come from other people, so a path may only name a file inside `folder`: no `..`, no link that leads out of it.
    """
    if isinstance(entry, bytes):
        return {"bytes": entry, "path": None}
    if isinstance(entry, dict) and entry.get("bytes"):
        if not isinstance(entry["bytes"], bytes):
            raise ImageError(f"has {type(entry['bytes']).__name__} where its bytes should be")
        return {"bytes": entry["bytes"], "path": None}
    name = entry.get("path") if isinstance(entry, dict) else entry
    if not name or not isinstance(name, str):
        raise ImageError("is empty")
    if data := embedded_bytes(name):
        return {"bytes": data, "path": None}
    refuse_url(name)
    try:
        paths = [(folder / spelling).resolve() for spelling in spellings(name)]
        path = next((path for path in paths if path.is_file()), paths[0])
        inside, exists = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise ImageError(f"cannot be read: {str(error)[:SHOWN]}") from error
    if not inside:
        raise ImageError(f"lies outside the data's folder; move it inside and name it from there: {name[:SHOWN]}")
    if not exists:
        raise ImageError(f"is not there: {name[:SHOWN]} (paths count from {folder})")
    return {"bytes": None, "path": str(path)}


def spellings(name: str) -> list[str]:
    """A path as it stands, and as it may be meant: as Windows or an address writes it, and with accents otherwise.

    A letter with an accent is one character in some file names, two in others.
    """
    meant = (name, name.replace("\\", "/"), unquote(name))
    return list(dict.fromkeys(unicodedata.normalize(form, n) for n in meant for form in ("NFC", "NFD")) | {name: None})


def embedded_bytes(text: str) -> bytes | None:
    """What a data URL holds, or base64 that is too long to be a path; None for any other text.

    Raises:
        ImageError: it is not valid base64.
    """
    match = re.match(r"data:image/[\w.+-]+(?:;[\w.+-]+=[^;,]*)*;base64,", text[:SHOWN], re.IGNORECASE)
    if not match and (len(text) < LONGEST_PATH or not re.fullmatch(r"[A-Za-z0-9+/=\s]+", text)):
        return None
    content = re.sub(r"\s", "", text[match.end() if match else 0 :])
    try:
        return base64.b64decode(content + "=" * (-len(content) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(f"is not valid base64: {error}") from error


def refuse_url(path: str) -> None:
    """No address (http://, s3://, zip://, data:), which fsspec would fetch."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", path):
        raise ImageError(f"is a URL; download it first: {path[:SHOWN]}")
