"""One process of several: trains a few steps and writes down what was logged. Run by test_distributed.py."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from smolvlm_exp.engine.grpo_trainer import SharedPrefixGRPOTrainer
from smolvlm_exp.models.model import load_processor
from tests import fsdp_on_cpu
from tests.engine.test_grpo_trainer import Bench as GRPOBench
from tests.engine.test_trainers import CONFIG, Bench, history, load_preferences


def main(folder: Path, engine: str, changes: dict[str, Any]) -> None:
    fsdp_on_cpu.patch()
    processor = load_processor(CONFIG.model)
    data = load_preferences(CONFIG.data, processor, folder)
    if engine == "grpo":
        learn_from_answers(GRPOBench(processor, data, folder), folder, changes)
        return
    bench = Bench(processor, data, folder)
    fails = changes.pop("fails", None)
    trainer = getattr(bench, engine)(**changes)
    assert trainer.is_fsdp_enabled == ("ACCELERATE_USE_FSDP" in os.environ)
    rank = trainer.accelerator.process_index
    if fails == rank:
        run_out_of_memory(trainer)
    events, _ = history(trainer)
    (folder / f"{rank}.json").write_text(json.dumps({"events": events, "micro_batch": trainer.micro_batch}))


def learn_from_answers(bench: GRPOBench, folder: Path, changes: dict[str, Any]) -> None:
    """GRPO: the answers are written down too, and the weights at the end. The second process runs smaller parts."""
    trainer = bench.engine(kind=SharedPrefixGRPOTrainer, **changes)
    rank = trainer.accelerator.process_index
    trainer.micro_batch //= 1 + rank
    drawn, generate = [], trainer._generate_single_turn

    def kept(*args: Any) -> Any:
        answers, rest = generate(*args)
        drawn.append(answers)
        return answers, rest

    trainer._generate_single_turn = kept
    events, weights = history(trainer)
    (folder / f"{rank}.json").write_text(json.dumps({"events": events, "answers": drawn}))
    save_file(weights, folder / f"{rank}.safetensors")


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
