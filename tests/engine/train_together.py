"""One process of several: trains a few steps and writes down what was logged. Run by test_distributed.py."""

import json
import sys
from pathlib import Path

from smolvlm_exp.model import load_processor
from tests.engine.test_trainer import CONFIG, Bench, history, load_preferences


def main(folder: Path, engine: str, changes: dict) -> None:
    processor = load_processor(CONFIG.model)
    bench = Bench(processor, load_preferences(CONFIG.data, processor, folder), folder)
    trainer = getattr(bench, engine)(**changes)
    events, _ = history(trainer)
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(events))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
