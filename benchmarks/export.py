"""What an export costs and gains on this machine, PyTorch against ONNX Runtime, and what a kept cache is worth.

    python -m benchmarks.export --model tiny            seconds
    python -m benchmarks.export --model smolvlm_256m    minutes: random weights in the real shape

What is compared runs in one process, in turns, and the best of several counts: other processes only add time.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from smolvlm_exp.command import check_command, register_schemas
from smolvlm_exp.export.onnx import Graphs, with_data
from smolvlm_exp.export.parts import PARTS, SUFFIXES
from smolvlm_exp.model import load_model, load_processor
from smolvlm_exp.session.onnx_model import OnnxModel
from smolvlm_exp.session.session import Sampling, SmolVLMSession
from smolvlm_exp.session.torch_model import TorchModel

MIB = 2**20
DEPTHS = (64, 1024)  # tokens that are there when the next one is timed
TURNS = 5
SAID = Sampling(max_new_tokens=16)
PICTURE = (512, 384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--longest-edge", type=int, help="of the processor, in place of the shape's own: fewer tiles")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    config = configured(arguments.model, arguments.longest_edge)
    model: Any = load_model(config.model).float()
    processor = load_processor(config.model)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        graphs = Graphs(Path(folder), model, processor)
        print(f"{arguments.model}: three graphs in float32 in {time.perf_counter() - begun:.0f} s")
        for precision in ("int8", "int4"):
            begun = time.perf_counter()
            graphs.files(dict.fromkeys(PARTS, precision))
            print(f"{precision}: {time.perf_counter() - begun:.0f} s more")
        sizes(graphs)
        runners = {"PyTorch float32": TorchModel(model)} | {
            f"ONNX {name}": OnnxModel(graphs.folder, dict.fromkeys(PARTS, name)) for name in SUFFIXES
        }
        if arguments.model != "tiny":  # bfloat16 on a CPU does not go with its narrow layers
            runners["PyTorch bfloat16"] = TorchModel(load_model(config.model).bfloat16())
        runners |= in_8_bits(config)
        speed(runners, processor, arguments.times)
        turns(runners, processor, max(arguments.times // 2, 1))


def configured(model: str, longest_edge: int | None) -> Any:
    from types import SimpleNamespace

    register_schemas()
    weights = "pretrained" if model == "tiny" else "random"
    overrides = [f"model={model}", f"model.weights={weights}", "quant=none", "model.dtype=float32"]
    overrides += [f"model.shape.longest_edge={longest_edge}"] if longest_edge else []
    given = SimpleNamespace(overrides=overrides, multirun=False, config_path=None, config_name=None, config_dir=None)
    return check_command(given)[0]


def in_8_bits(config: Any) -> dict[str, TorchModel]:
    """The model with torchao's int8 weights, where torchao is installed."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return {}
    model = load_model(config.model).float()
    quantize_(model, Int8WeightOnlyConfig())
    return {"PyTorch int8 (torchao)": TorchModel(model)}


def sizes(graphs: Graphs) -> None:
    print("\n| MiB | " + " | ".join(SUFFIXES) + " |\n|---|" + "---|" * len(SUFFIXES))
    for part in PARTS:
        cells = [sum(f.stat().st_size for f in with_data(graphs.file(part, name))) / MIB for name in SUFFIXES]
        print(f"| {part} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


def best(runners: dict[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Seconds of each, in turns, the best of `times`."""
    found = dict.fromkeys(runners, float("inf"))
    for _ in range(times):
        for name, run in runners.items():
            begun = time.perf_counter()
            run()
            found[name] = min(found[name], time.perf_counter() - begun)
    return found


def speed(runners: dict[str, Any], processor: Any, times: int) -> None:
    """Milliseconds a token with little and with much before it, a prompt, and a tile."""
    tokens = [5] * max(DEPTHS)
    picture = SmolVLMSession(next(iter(runners.values())), processor).writer.picture(Image.new("RGB", PICTURE, "teal"))
    pixels = picture.pixel_values[:, :1], picture.pixel_attention_mask[:, :1]
    columns: dict[str, dict[str, float]] = {}
    limit = next(iter(runners.values())).config.text_config.max_position_embeddings
    for depth in (depth for depth in DEPTHS if depth < limit):
        pasts = {name: runner.extend(tokens[:depth], [], [], ())[1] for name, runner in runners.items()}

        def token(runner: Any, past: Any) -> Callable[[], Any]:
            return lambda: runner.extend([7], [], [], past)

        steps = {name: token(runner, pasts[name]) for name, runner in runners.items()}
        columns[f"a token after {depth}"] = best(steps, 4 * times)

    def of(name: str, *given: Any) -> dict[str, Callable[[], Any]]:
        return {each: lambda runner=runner: getattr(runner, name)(*given) for each, runner in runners.items()}  # type: ignore[misc]

    columns["a prompt of 512"] = best(of("extend", tokens[:512], [], [], ()), times)
    columns["a tile"] = best(of("features", *pixels), times)
    print("\n| milliseconds | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in runners:
        print(f"| {name} | " + " | ".join(f"{1000 * column[name]:.1f}" for column in columns.values()) + " |")


def turns(runners: dict[str, Any], processor: Any, times: int) -> None:
    """Time to the first token and tokens a second in a conversation about one picture."""
    print(f"\n| a picture of {PICTURE[0]}x{PICTURE[1]}, {SAID.max_new_tokens} tokens a turn | kept | prompt, turn 5 | "
          "first token, turn 1, s | turn 5, s | tokens/s, turn 5 |\n|---|---|---|---|---|---|")  # fmt: skip
    for name, runner in runners.items():
        for budget, kept in ((2**30, "yes"), (0, "no")):
            told = [list(conversation(SmolVLMSession(runner, processor, budget))) for _ in range(times)]
            first, last = (min(each[i] for each in told) for i in (0, -1))
            print(f"| {name} | {kept} | {last[2]} | {first[0]:.3f} | {last[0]:.3f} | {last[1]:.1f} |", flush=True)


def conversation(session: SmolVLMSession) -> Iterator[tuple[float, float, int]]:
    """Of every turn: seconds to the first token, tokens a second after it, tokens of the prompt."""
    talk, image = session.conversation(), Image.linear_gradient("L").resize(PICTURE).convert("RGB")
    for turn in range(TURNS):
        begun = time.perf_counter()
        answer = talk.say("What is next to it, and why?", [] if turn else [image], SAID)
        answer.finish()
        after = time.perf_counter() - begun - answer.first_token
        yield answer.first_token, (len(answer.ids) - 1) / after, answer.prompt_tokens


if __name__ == "__main__":
    main()
