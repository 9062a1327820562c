"""Answers a second on drawn scenes, eight to a prompt at temperature 1: the sampler beside transformers' `generate`.

python -m benchmarks.answers [--prompts 64]

The embedded model, captions and questions mixed, image features computed before the clock starts for the sampler, and
by `generate` itself.
"""

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.setting import compose, device_name

ANSWERS, TOKENS = 8, 48


def main() -> None:
    from smolvlm_exp.data.preferences import load_preferences
    from smolvlm_exp.engine.generation.answers import packed_prompts, sample_answers
    from smolvlm_exp.engine.generation.sampling import Sampling
    from smolvlm_exp.evaluation.generate import upstream_answers
    from smolvlm_exp.evaluation.held_out import HeldOut
    from smolvlm_exp.models.model import load_model, load_processor
    from smolvlm_exp.training.engine_setup import disk_cache
    from smolvlm_exp.utils.startup import silence_upstream

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    count = parser.parse_args().prompts
    silence_upstream()
    config = compose("data.train_rows=16", f"data.test_rows={count}")
    processor = load_processor(config.model)
    data = load_preferences(config.data, processor, Path(tempfile.mkdtemp()))
    model = load_model(config.model, None, 0).requires_grad_(False)
    held_out = HeldOut(data, processor, ANSWERS, None)
    held_out.precompute(model, disk_cache(config.trainer), 0)
    prompts = packed_prompts(model, held_out.rows, held_out.pixels, range(count))
    sampling = Sampling(TOKENS, temperature=1.0)
    rows = [row for row in data.test for _ in range(ANSWERS)]
    ways = {
        "the sampler": lambda: sample_answers(model, processor, prompts, sampling, ANSWERS),
        "generate": lambda: upstream_answers(model, processor, rows, sampling),
    }
    print(f"{count} prompts x {ANSWERS} answers, {device_name()}")
    for name, way in ways.items():
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - began)
        print(f"{name}: {count * ANSWERS / min(seconds):.0f} answers/s")


if __name__ == "__main__":
    main()
