"""What each of the engine's Triton kernels gains, and liger-kernel's or torch.compile's in their place.

    python -m benchmarks.kernels [--pairs 16] [--steps 7] [--minutes 8] [--json FILE]

Whole optimiser steps (nf4, DoRA, random weights in the real shape; forward, backward, AdamW): SmolVLM-Instruct and the
256M with text adapters over precomputed image features, SmolVLM-Instruct with the recipe's modules. Variants:

engine      every kernel of engine/layers/kernels
no NAME     that kernel off, forward and backward: the torch code of ops.py, or bitsandbytes, does its work
liger       liger-kernel's RMSNorm, SwiGLU and RoPE; what they do not do (DoRA's gains, columns to spare, the sum with
            the residual, keys of a shared prefix) takes operations of its own around them
compile     torch.compile of ops.py's torch code in place of all kernels but the unpacking of nf4

All variants run on one model, one step each in turn, so that they share the machine's noise; a variant's first pass,
before any step, shows how far its gradient is from the engine's. Seconds are medians. Every line is printed as it
is measured, and --json is rewritten after every round; no round begins after --minutes.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import torch

from benchmarks.setting import GIB, device_name, empty_cache, matmul_rate
from benchmarks.step import DEVICE, dpo_loss, make_batch, make_model, prepare
from smolvlm_exp.engine.layers import ops, quantized_weights
from smolvlm_exp.engine.layers.fuse import fuse
from smolvlm_exp.utils.startup import silence_upstream

Replacements = dict[tuple[ModuleType, str], Any]  # (module, name) -> what stands there instead
SETTINGS = {
    "2.2B text": ("smolvlm", "text"),
    "256M text": ("smolvlm_256m", "text"),
    "2.2B recipe": ("smolvlm", "recipe"),
}
KERNELS = {  # functions of ops.py
    "norm": ("norm", "norm_backward"),
    "affine": ("affine",),
    "scale_backward": ("scale_backward",),
    "swiglu": ("activation", "activation_backward"),
    "rotary": ("rotary", "rotary_backward"),
    "gelu": ("activation", "activation_backward"),
}
GATED = {"swiglu": True, "gelu": False}  # for which calls of `activation` a kernel of KERNELS is meant
VISION_ONLY = ("gelu",)


def torch_only() -> Any:
    """ops.py once more, as it is where there is no Triton."""
    spec = importlib.util.spec_from_file_location("benchmarks.torch_ops", ops.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.kernels = None  # type: ignore[attr-defined]
    return module


class Sources(NamedTuple):
    """What ops.py's torch code reads of a layout, for torch.compile."""

    sources: torch.Tensor


def compiled(plain: Any, backend: str) -> Replacements:
    torch._dynamo.config.recompile_limit = 64  # with and without gains, bias, columns to spare

    def compile(function: Callable[..., Any]) -> Any:
        return torch.compile(function, dynamic=True, backend=backend)

    names = [name for functions in KERNELS.values() for name in functions]
    made: Replacements = {(ops, name): compile(getattr(plain, name)) for name in names}
    rotary = compile(lambda *a: plain.rotary(*a[:4], Sources(a[4]), a[5]))
    rotary_backward = compile(lambda *a: plain.rotary_backward(*a[:5], Sources(a[5]), a[6]))
    made[ops, "rotary"] = lambda u, gain, cos, sin, layout, heads: rotary(u, gain, cos, sin, layout.sources, heads)
    made[ops, "rotary_backward"] = lambda grads, u, gain, cos, sin, layout, tail: rotary_backward(
        grads, u, gain, cos, sin, layout.sources, tail
    )
    return made


def liger(plain: Any) -> Replacements:
    """liger-kernel's functions in our functions' places; `ops.affine` and `ops.scale_backward` do DoRA's gains."""
    from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward
    from liger_kernel.ops.rope import rope_backward, rope_forward
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward, swiglu_fused_gate_up_forward
    from liger_kernel.ops.utils import calculate_settings

    layer_norm, layer_norm_backward = ops.norm, ops.norm_backward
    gelu, gelu_backward = ops.activation, ops.activation_backward

    def norm(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, tail: int = 0
    ) -> torch.Tensor:
        if bias is not None:
            return layer_norm(x, weight, bias, eps, tail)
        return plain.with_tail(rms_norm_forward(x, weight, eps, 0.0, "llama", None)[0], tail)

    def norm_backward(
        dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor, centred: bool
    ) -> torch.Tensor:
        if centred:
            return layer_norm_backward(dy, x, weight, eps, residual, centred)
        # liger would have kept it from the forward pass
        squares = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()
        rstd = torch.rsqrt(squares / x.shape[1] + eps)
        sizes = calculate_settings(x.shape[1])
        dx, _ = rms_norm_backward(dy.contiguous(), x, weight, rstd, 0.0, 0, *sizes, True, None, needs_dw=False)
        return dx.add_(residual)

    def gained(u: torch.Tensor, gain: Any) -> torch.Tensor:
        return u.contiguous() if gain is None else ops.affine(None, u, gain, None)

    def activation(u: torch.Tensor, gain: Any, bias: Any, tail: int, gated: bool) -> torch.Tensor:
        if not gated:
            return gelu(u, gain, bias, tail, gated=False)
        return plain.with_tail(swiglu_fused_gate_up_forward(gained(u, gain))[1], tail)

    def activation_backward(
        da: torch.Tensor,
        u: torch.Tensor,
        gain: Any,
        bias: Any,
        tail: int,
        with_result: bool,
        in_place: bool,
        gated: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not gated:
            return gelu_backward(da, u, gain, bias, tail, with_result, in_place, gated=False)
        gate_up = gained(u, gain)
        inner = swiglu_fused_gate_up_forward(gate_up)[1] if with_result else None
        dy = swiglu_fused_gate_up_backward(gate_up, da.contiguous(), in_place=gain is not None)
        du, dgain = ops.scale_backward([dy], u, gain, tail)
        return du, inner, dgain

    def rotary(u: torch.Tensor, gain: Any, cos: torch.Tensor, sin: torch.Tensor, layout: Any, heads: Any) -> Any:
        query, key, value = plain.split_heads(gained(u, gain), heads)
        query, key = (part.contiguous().transpose(0, 1)[None] for part in (query, key))
        query, key = (part[0].transpose(0, 1) for part in rope_forward(query, key, cos, sin)[:2])
        return query, key[layout.sources], value[layout.sources]

    def rotary_backward(
        grads: Any, u: torch.Tensor, gain: Any, cos: torch.Tensor, sin: torch.Tensor, layout: Any, tail: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dquery, dkey, dvalue = grads
        tokens = len(dquery)
        dkey, dvalue = (
            d.new_zeros(tokens, *d.shape[1:], dtype=torch.float32).index_add_(0, layout.sources, d.float()).to(d.dtype)
            for d in (dkey, dvalue)
        )
        dquery, dkey = (d.contiguous().transpose(0, 1)[None] for d in (dquery, dkey))
        dquery, dkey = (d[0].transpose(0, 1) for d in rope_backward(dquery, dkey, cos, sin))
        parts = [d.reshape(tokens, -1) for d in (dquery, dkey, dvalue)]
        if dquery.shape != dkey.shape:
            parts = [torch.cat(parts, dim=1)]
        return ops.scale_backward(parts, u, gain, tail)

    made = (norm, norm_backward, activation, activation_backward, rotary, rotary_backward)
    return {(ops, function.__name__): function for function in made}


def only_where(gated: bool, replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`replacement` for one of the two activations, `original` for the other."""
    return lambda *args, **options: (replacement if options["gated"] is gated else original)(*args, **options)


def variants(only: list[str], backend: str) -> dict[str, Replacements]:
    plain = torch_only()
    made: dict[str, Replacements] = {"engine": {}}
    for kernel, names in KERNELS.items():
        made[f"no {kernel}"] = {(ops, name): getattr(plain, name) for name in names}
        if kernel in GATED:
            for place, function in made[f"no {kernel}"].items():
                made[f"no {kernel}"][place] = only_where(GATED[kernel], function, getattr(*place))
    made["no unpack_4bit"] = {(quantized_weights, "kernels"): None}
    try:
        made["liger"] = liger(plain)
    except ImportError as error:
        print(f"liger is left out: {error}", flush=True)
    made["compile"] = compiled(plain, backend)
    return {name: replacements for name, replacements in made.items() if not only or name in ("engine", *only)}


@contextmanager
def replaced(replacements: Replacements) -> Iterator[None]:
    before = {place: getattr(*place) for place in replacements}
    try:
        for (module, name), function in replacements.items():
            setattr(module, name, function)
        yield
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


class Steps:
    """Optimiser steps of one model on one batch, under one variant after another."""

    def __init__(self, name: str, model: str, target: str, asked: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.name, self.pairs, self.passes = name, asked.pairs, asked.pairs // asked.micro
        self.model, shape = make_model(model, "dora", target, quant=True)
        prepare(self.model)
        problems = fuse(self.model, asked.checkpointing, asked.checkpointing if target == "recipe" else "full")
        assert not problems, problems
        self.batch = make_batch(shape, asked.micro, asked.tiles, features=target == "text")
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=DEVICE == "cuda")
        self.expected: torch.Tensor | None = None

    def gradient_error(self, replacements: Replacements) -> float:
        """|gradient - the engine's| / |the engine's|; the first call is the engine's own."""
        with replaced(replacements):
            dpo_loss(self.model, *self.batch).backward()
        gradient = torch.cat([p.grad.float().flatten() for p in self.trained if p.grad is not None]).cpu()
        self.model.zero_grad(set_to_none=True)
        if self.expected is None:
            self.expected = gradient
        return float((gradient - self.expected).norm() / self.expected.norm())

    def step(self, replacements: Replacements) -> tuple[float, float]:
        """Seconds per pair, peak GiB."""
        wait()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with replaced(replacements):
            for _ in range(self.passes):
                (dpo_loss(self.model, *self.batch) / self.passes).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait()
        peak = torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else 0.0
        return (time.perf_counter() - start) / self.pairs, peak


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compare(steps: Steps, made: dict[str, Replacements]) -> dict[str, dict[str, Any]]:
    """Entries of the table, for the variants that run; their kernels compile here."""
    table: dict[str, dict[str, Any]] = {}
    for name, replacements in made.items():
        start = time.perf_counter()
        entry: dict[str, Any] = {"setting": steps.name, "variant": name, "seconds": [], "peak": 0.0}
        try:
            entry["gradient error"] = steps.gradient_error(replacements)
            table[name] = entry
            outcome = f"gradient {entry['gradient error']:.1e} from the engine's"
        except Exception as error:  # whatever a library of another version raises
            if name == "engine":
                raise
            steps.model.zero_grad(set_to_none=True)
            outcome = f"left out: {type(error).__name__}: {str(error)[:500]}"
        print(f"{steps.name}, {name}: {outcome}; first pass {time.perf_counter() - start:.1f} s", flush=True)
        empty_cache()
    return table


def measure(
    steps: Steps, made: dict[str, Replacements], rounds: int, deadline: float, save: Callable[[Any], None]
) -> Any:
    table = compare(steps, made)
    names = list(table)
    for turn in range(rounds + 1):
        if time.monotonic() > deadline and turn > 1:
            print(f"{steps.name}: time is up after {turn - 1} of {rounds} rounds", flush=True)
            break
        start = turn % len(names)
        measured = {name: steps.step(made[name]) for name in names[start:] + names[:start]}
        if turn == 0:  # the optimiser's own warm-up
            continue
        for name, (seconds, peak) in measured.items():
            table[name]["seconds"].append(seconds)
            table[name]["peak"] = max(table[name]["peak"], peak)
        line = ", ".join(f"{name} {1000 * measured[name][0]:.2f}" for name in names)
        print(f"{steps.name}, round {turn}, ms per pair: {line}", flush=True)
        save(list(table.values()))
    return list(table.values())


def show(table: list[dict[str, Any]]) -> None:
    print(
        "\n| setting | variant | s/pair | engine is faster by | peak GiB | gradient error |\n|---|---|---|---|---|---|"
    )
    engine = median(table[0]["seconds"])
    for entry in table:
        seconds = median(entry["seconds"])
        print(
            f"| {entry['setting']} | {entry['variant']} | {seconds:.4f} | {seconds / engine - 1:+.1%} "
            f"| {entry['peak']:.2f} | {entry['gradient error']:.1e} |"
        )
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="in a step")
    parser.add_argument("--micro", type=int, default=8, help="pairs in one forward and backward pass")
    parser.add_argument("--steps", type=int, default=7, help="measured, of every variant")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiles", type=int, default=13, help="of an image")
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--only", default="", help="variants beside the engine")
    parser.add_argument("--model", default=None, help="another model, in place of all settings' (tiny, on a CPU)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--json", default=None)
    asked = parser.parse_args()
    silence_upstream()
    deadline = time.monotonic() + 60 * asked.minutes
    print(f"{device_name()}, torch {torch.__version__}: {matmul_rate() / 1e12:.0f} TFLOP/s", flush=True)
    made = variants(asked.only.split(",") if asked.only else [], asked.backend)
    finished: list[dict[str, Any]] = []

    def save(table: list[dict[str, Any]]) -> None:
        if asked.json:
            Path(asked.json).write_text(json.dumps([*finished, *table], indent=1) + "\n", encoding="utf-8")

    for name in asked.settings.split(","):
        if time.monotonic() > deadline:
            print(f"{name}: time is up", flush=True)
            continue
        model, target = SETTINGS[name]
        steps = Steps(name, asked.model or model, target, asked)
        text_only = target == "text"
        used = {key: v for key, v in made.items() if not (text_only and key.removeprefix("no ") in VISION_ONLY)}
        table = measure(steps, used, asked.steps, deadline, save)
        finished += table
        show(table)
        del steps
        empty_cache()


if __name__ == "__main__":
    main()
