"""Settings that every data source has."""

from dataclasses import dataclass

from omegaconf import MISSING

from smolvlm_exp.utils.fields import at_least, one_of


@dataclass
class DataConfig:
    """A source's own `Config` (in `data/sources/<source>.py`) adds to these."""

    source: str = MISSING  # the module in smolvlm_exp/data/sources that loads the rows
    train: str = "train"  # split or slice to train on, such as `train[:6%]`
    test: str = "test"  # held-out rows: evaluated before and after, never trained on
    max_edge: int = at_least(1, 512)  # larger images are shrunk to it: saves disk and decode time, no tokens
    num_proc: int | None = at_least(1, None)  # processes that prepare images; null: one per core that may be used
    max_length: int | None = at_least(1, None)  # tokens of prompt and answer; null: no limit. Image tokens are not cut
    on_long_answer: str = one_of("cut", "report")  # an answer that runs past max_length is shortened, or is a bad row
    on_bad_row: str = one_of("error", "skip")
    max_bad_rows: float = at_least(0, 0.2)  # with skip: the share of a split that may be bad before the run stops
    max_pixels: int = at_least(1, 100_000_000)  # of an image, checked before it is decoded
    max_image_mib: int = at_least(1, 64)  # of an image's file
    first_frame: bool = False  # take the first frame of animations and of TIFFs with several pages
