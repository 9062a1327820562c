"""What an export costs and gains on this machine, PyTorch against ONNX Runtime, and what a kept cache is worth.

    python -m benchmarks.export --model tiny            seconds
    python -m benchmarks.export --model smolvlm_256m    random weights in the real shape, within --minutes (9)

What is compared runs in one process, in turns, and the best of several counts: other processes only add time. There are
as many rounds as --minutes leaves room for, at least one; each row is printed when it is measured. The load it prints
says what else the machine does. Random shapes read a picture as one tile (--longest-edge).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from smolvlm_exp.config.compose import check_command, register_schemas
from smolvlm_exp.deploy.export.onnx_export import Graphs
from smolvlm_exp.deploy.options import DECODER, PARTS, SUFFIXES
from smolvlm_exp.deploy.session.answer import Answer
from smolvlm_exp.deploy.session.backends import OnnxModel, TorchModel
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.models.model import load_model, load_processor
from smolvlm_exp.utils.startup import silence_upstream

MIB = 2**20
DEPTHS = (64, 1024)  # tokens that are there when the next one is timed
TURNS = 5
SAID = Sampling(max_new_tokens=16)
PICTURE = (512, 384)
ROWS = 8  # what --minutes is divided by: four rows of milliseconds, and conversations, which take as much again
TORCH, INT8 = "PyTorch float32", "ONNX int8"


class Clock:
    """The time there is, dealt out a row at a time, so that the last row comes too."""

    def __init__(self, minutes: float) -> None:
        self.end, self.rows = time.perf_counter() + 60 * minutes, ROWS

    def share(self, rows: int = 1) -> float:
        """When the next `rows` rows must be done; what earlier ones left over is theirs."""
        now = time.perf_counter()
        share = max(self.end - now, 0) * rows / max(self.rows, 1)
        self.rows -= rows
        return now + share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--times", type=int, default=5, help="rounds, where there is time for them")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; at least one round is done")
    parser.add_argument(
        "--longest-edge", type=int, help="of the processor; default: the tiny model's own, one tile elsewhere"
    )
    arguments = parser.parse_args()
    clock, threads = Clock(arguments.minutes), os.cpu_count() or 1
    silence_upstream()
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # ONNX Runtime's sessions read it: as many as PyTorch has
    tell(f"{arguments.model}: {threads} cores, {load()}")
    config = configured(arguments.model, arguments.longest_edge)
    model: Any = load_model(config.model).float()
    processor = load_processor(config.model)
    with tempfile.TemporaryDirectory() as folder:
        graphs = exported(Path(folder), model, processor)
        runners = {TORCH: TorchModel(model)} | {
            f"ONNX {name}": OnnxModel(graphs.folder, dict.fromkeys(PARTS, name)) for name in SUFFIXES
        }
        if arguments.model != "tiny":  # bfloat16 on a CPU does not go with its narrow layers
            runners["PyTorch bfloat16"] = TorchModel(load_model(config.model).bfloat16())
        runners |= in_8_bits(config)
        speed(runners, processor, arguments.times, clock)
        turns(runners, processor, arguments.times, clock)
    tell(f"\n{load()} at the end")


def tell(line: str) -> None:
    print(line, flush=True)


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


def configured(model: str, longest_edge: int | None) -> Any:
    from types import SimpleNamespace

    register_schemas()
    weights = "pretrained" if model == "tiny" else "random"
    overrides = [f"model={model}", f"model.weights={weights}", "quant=none", "model.dtype=float32"]
    given = SimpleNamespace(overrides=overrides, multirun=False, config_path=None, config_name=None, config_dir=None)
    config = check_command(given)[0]
    if config.model.shape is not None and (longest_edge or model != "tiny"):
        config.model.longest_edge = longest_edge or config.model.shape.image_size
    return config


def exported(folder: Path, model: Any, processor: Any) -> Graphs:
    """The graphs in every precision, with how long they took and how large they are."""
    begun = time.perf_counter()
    graphs = Graphs(folder, model, processor)
    tell(f"three graphs in float32 in {time.perf_counter() - begun:.0f} s")
    for precision in ("int8", "int4"):
        begun = time.perf_counter()
        graphs.files(dict.fromkeys(PARTS, precision))
        tell(f"{precision}: {time.perf_counter() - begun:.0f} s more")

    def mib(part: str, name: str) -> float:
        return graphs.size({part: name}) / MIB

    tell(header("MiB", *SUFFIXES))
    for part in PARTS:
        tell(row(part, *(f"{mib(part, name):.1f}" for name in SUFFIXES)))
    tell(f"\nint8 decoder: {mib(DECODER, 'int8') / mib(DECODER, 'fp32'):.1%} of float32's size")
    return graphs


def in_8_bits(config: Any) -> dict[str, TorchModel]:
    """The model with torchao's int8 weights, where torchao is installed."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return {}
    model = load_model(config.model).float()
    quantize_(model, Int8WeightOnlyConfig())
    return {"PyTorch int8 (torchao)": TorchModel(model)}


def header(*cells: str) -> str:
    return f"\n{row(*cells)}\n{'|---' * len(cells)}|"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def best(runners: dict[str, Callable[[], Any]], times: int, until: float) -> dict[str, float]:
    """Seconds of each, in turns, the best of `times`; of fewer, but not of none, once it is `until`."""
    found = dict.fromkeys(runners, float("inf"))
    for _ in rounds(times, until):
        for name, run in runners.items():
            begun = time.perf_counter()
            run()
            found[name] = min(found[name], time.perf_counter() - begun)
    return found


def rounds(times: int, until: float) -> Iterator[None]:
    """`times`, or fewer, but not none, where another that takes as long as the last would end after `until`."""
    for _ in range(times):
        begun = time.perf_counter()
        yield
        now = time.perf_counter()
        if now + (now - begun) > until:
            return


def speed(runners: dict[str, Any], processor: Any, times: int, clock: Clock) -> None:
    """Milliseconds a token with little and with much before it, a prompt, and a tile: a row for each."""
    tokens = [5] * max(DEPTHS)
    first = next(iter(runners.values()))
    prompts = SmolVLMSession(first, processor).prompts
    pixels = prompts.encode_image(Image.new("RGB", PICTURE, "teal")).tiles[:1], prompts.normalise
    tell(header("milliseconds", *runners, f"{INT8}, times {TORCH}"))

    def measured(what: str, runs: dict[str, Callable[[], Any]], times: int, until: float) -> None:
        found = best(runs, times, until)
        tell(row(what, *(f"{1000 * found[name]:.1f}" for name in runs), f"{found[TORCH] / found[INT8]:.1f} x"))

    def of(name: str, *given: Any) -> dict[str, Callable[[], Any]]:
        return {each: lambda runner=runner: getattr(runner, name)(*given) for each, runner in runners.items()}  # type: ignore[misc]

    def token(runner: Any, past: Any) -> Callable[[], Any]:
        return lambda: runner.extend([7], [], [], past)

    for depth in (depth for depth in DEPTHS if depth < first.config.text_config.max_position_embeddings):
        until = clock.share()
        pasts = {name: runner.extend(tokens[:depth], [], [], ())[1] for name, runner in runners.items()}
        steps = {name: token(runner, pasts[name]) for name, runner in runners.items()}
        measured(f"a token after {depth}", steps, 4 * times, until)
    measured("a prompt of 512", of("extend", tokens[:512], [], [], ()), times, clock.share())
    measured("a tile", of("features", *pixels), times, clock.share())


@dataclass
class Told:
    """A conversation about one picture; a second figure is without anything kept."""

    prompts: tuple[int, int]  # tokens, turns 1 and TURNS
    first: float  # seconds to the first token of turn 1, when nothing is kept yet
    last: tuple[float, float]  # of turn TURNS
    speed: tuple[float, float]  # tokens a second after it

    def better(self, other: "Told") -> "Told":
        last = min(self.last[0], other.last[0]), min(self.last[1], other.last[1])
        speed = max(self.speed[0], other.speed[0]), max(self.speed[1], other.speed[1])
        return Told(self.prompts, min(self.first, other.first), last, speed)


def turns(runners: dict[str, Any], processor: Any, times: int, clock: Clock) -> None:
    """Time to the first token and tokens a second, a row for each runner when it is done."""
    tell(
        header(
            f"a picture of {PICTURE[0]}x{PICTURE[1]}, {SAID.max_new_tokens} tokens a turn",
            f"prompt, turns 1 and {TURNS}",
            "first token, turn 1, s",
            f"turn {TURNS}, kept, s",
            f"turn {TURNS}, not kept, s",
            "kept is faster",
            f"tokens/s, turn {TURNS}, kept and not",
        )
    )
    clock.rows = len(runners)
    for name, runner in runners.items():
        until, found = clock.share(), None
        for _ in rounds(times, until):
            told = conversation(runner, processor)
            found = told.better(found) if found else told
        assert found is not None
        tell(
            row(
                name,
                "{} and {}".format(*found.prompts),
                f"{found.first:.3f}",
                *(f"{each:.3f}" for each in found.last),
                f"{found.last[1] / found.last[0]:.1f} x",
                "{:.1f} and {:.1f}".format(*found.speed),
            )
        )


def conversation(runner: Any, processor: Any) -> Told:
    """`TURNS` turns with what was read kept; and the last prompt, the same ids, read where nothing is kept."""
    image = Image.linear_gradient("L").resize(PICTURE).convert("RGB")
    session = SmolVLMSession(runner, processor)
    talk, answers = session.conversation(), list[Answer]()
    speeds = list[float]()
    for turn in range(TURNS):
        answer = talk.say("What is next to it, and why?", [] if turn else [image], SAID)
        asked = answer.prompt.copy()
        speeds.append(finished(answer))
        answers.append(answer)
    anew = SmolVLMSession(runner, processor, budget=0).answer(asked, SAID)
    speed = finished(anew)
    assert anew.cached_tokens == 0 < answers[-1].cached_tokens
    return Told(
        (answers[0].prompt_tokens, anew.prompt_tokens),
        answers[0].first_token,
        (answers[-1].first_token, anew.first_token),
        (speeds[-1], speed),
    )


def finished(answer: Answer) -> float:
    """Tokens a second after the first."""
    begun = time.perf_counter()
    answer.finish()
    return (len(answer.ids) - 1) / (time.perf_counter() - begun - answer.first_token)


if __name__ == "__main__":
    main()
