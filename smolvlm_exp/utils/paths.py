"""Where the package, its configuration and its runs are, and paths as people type them."""

from pathlib import Path

OUTPUTS = Path("outputs")
PACKAGE = Path(__file__).parent.parent
CONF = next(p for p in (PACKAGE / "_conf", PACKAGE.parent / "conf") if p.is_dir())


def relative_to_cwd(path: Path) -> Path:
    """A path as it would be typed: relative where it lies under the working folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path
