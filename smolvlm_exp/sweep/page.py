from pathlib import Path
from smolvlm_exp.sweep.outcome import Outcome
def write_page(found: Outcome) -> Path:
    p = found.folder/"sweep.html"; p.write_text(""); return p
