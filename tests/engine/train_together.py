"""One process of several: trains a few steps and writes down what was logged. Run by test_distributed.py."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from smolvlm_exp.models.model import load_processor
from tests import fsdp_on_cpu
from tests.engine.test_trainers import CONFIG, Bench, history, load_preferences


def main(folder: Path, engine: str, changes: dict[str, Any]) -> None:
    fsdp_on_cpu.patch()
    processor = load_processor(CONFIG.model)
    bench = Bench(processor, load_preferences(CONFIG.data, processor, folder), folder)
    fails = changes.pop("fails", None)
    trainer = getattr(bench, engine)(**changes)
    assert trainer.is_fsdp_enabled == ("ACCELERATE_USE_FSDP" in os.environ)
    rank = trainer.accelerator.process_index
    if fails == rank:
        run_out_of_memory(trainer)
    events, _ = history(trainer)
    (folder / f"{rank}.json").write_text(json.dumps({"events": events, "micro_batch": trainer.micro_batch}))


def run_out_of_memory(trainer: Any) -> None:
    """In the last micro-batch of the second step, after its forward pass, if it has more than one pair."""
    plain = trainer.micro_loss

    def failing(model: Any, batch: Any, micro: Any, *rest: Any) -> Any:
        loss = plain(model, batch, micro, *rest)
        if trainer.state.global_step == 1 and len(micro.rows) == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 8 pebibytes")
        return loss

    trainer.micro_loss = failing


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
