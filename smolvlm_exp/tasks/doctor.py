"""Can this machine run the main job? `python -m smolvlm_exp task=doctor` finds out by doing it in small.

Each check is a function that returns one `Finding`, printed as one line with the figure seen and, where something is
wrong, the fix. `fail` means that `python -m smolvlm_exp` (tiny model, nf4, DoRA, DPO) cannot run; `warn` means that it
runs and something else will not, or not well. No check asks a question, needs an account, or prints a secret.
"""

import io
import logging
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.reporting.advice import advise_run
from smolvlm_exp.runs.find import find_ended_run
from smolvlm_exp.utils.gpu import has
from smolvlm_exp.utils.hub import ping
from smolvlm_exp.utils.paths import OUTPUTS
from smolvlm_exp.utils.units import GIB
from smolvlm_exp.utils.versions import check_torchvision

if TYPE_CHECKING:
    from smolvlm_exp.config.schema import Config

COLOURS = {"ok": "\033[32m", "warn": "\033[33m", "fail": "\033[31m"}
MATMUL_LIMIT = 1e-2  # float32 is off by 1e-7, TF32 by up to 1e-3, bfloat16 by 2e-3 to 3e-3
NF4_LIMIT = 0.12  # nf4 in blocks of 64: 0.091 to 0.093, whatever the numbers; fp4: 0.121 to 0.123
HUB_SECONDS = 3.0
INSTALL = "`make run`, or pip install -e . in the checkout"
NO_GPU = "or leave the GPU out: CUDA_VISIBLE_DEVICES=-1"
HF_HOME = Path(os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/huggingface").expanduser()
PYTHON = (3, 11)  # requires-python
MODELS = {"smolvlm": 7.0, "smolvlm_500m": 4.0}  # -> free GiB for nf4 and text adapters; less: smolvlm_256m


@dataclass
class Finding:
    """The outcome of one check. `fix` is empty when the verdict is ok."""

    name: str
    verdict: str  # ok | warn | fail
    detail: str
    fix: str = ""


def doctor(config: "Config", folder: Path) -> None:
    """Check this machine, or with `run=` say what a run's own figures advise.

    Raises:
        SystemExit: 1: the main job cannot run here.
    """
    if config.run:
        run = find_ended_run(config.run)
        print(f"run: {run}", *advise_run(run) or ["no sign of a known problem"], sep="\n\n")
    elif check_machine(OUTPUTS):
        raise SystemExit(1)


def check_machine(outputs: Path) -> int:
    """Run every check, one line per check. Returns 1 when the main job cannot run, else 0. `outputs` need not exist."""
    # name, function, and the verdict and fix when it raises
    checks: list[tuple[str, Callable[[], Finding], str, str]] = [
        ("python", check_python, "fail", "make a virtual environment with a newer Python"),
        ("packages", check_packages, "warn", f"a plain checkout is not installed: {INSTALL}"),
        ("imports", check_imports, "fail", f"reinstall what is named: {INSTALL}"),
        ("matmul", partial(check_matmul, "matmul", "float32"), "fail", f"reinstall torch, {NO_GPU}"),
        ("cuda", check_cuda, "fail", f"repair the driver, {NO_GPU}"),
        ("bf16", partial(check_matmul, "bf16", "bfloat16"), "fail", f"reinstall torch, {NO_GPU}"),
        ("nf4", check_nf4, "fail", "reinstall bitsandbytes, or run without 4 bit: quant=none"),
        ("flash-attn", check_flash_attention, "warn", "pip uninstall flash-attn, or rebuild it"),
        ("images", check_images, "fail", "reinstall pillow"),
        ("memory", check_memory, "warn", "pip install psutil"),
        ("disk", partial(check_folder, "disk", outputs), "fail", "write elsewhere: hydra.run.dir=FOLDER"),
        ("cache", partial(check_folder, "cache", HF_HOME), "warn", "keep downloads elsewhere: HF_HOME=FOLDER"),
        ("hub", check_hub, "warn", "nothing for the embedded default, which needs no hub"),
        ("w&b", check_wandb, "warn", "tracker=none, or reinstall wandb"),
    ]
    width = max(len(name) for name, *_ in checks)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    seen = []
    for check in checks:
        seen.append(attempt(*check))
        print(line(seen[-1], width, colour), flush=True)
    failed, warned = (", ".join(f.name for f in seen if f.verdict == level) for level in ("fail", "warn"))
    verdict = f"cannot run here. Fix first: {failed}." if failed else "can run here."
    print(f"\n`python -m smolvlm_exp` {verdict}" + (f" Worth a look: {warned}." if warned else ""))
    if not failed:
        print(
            "\n".join(
                ["", "on this machine:", *(f"  python -m smolvlm_exp {typed}".rstrip() for typed in fitting_commands())]
            )
        )
    return int(bool(failed))


def fitting_commands() -> list[str]:
    """The default, and what suits the GPU: a model that fits, planned within its memory; without one what is small."""
    import torch

    if not torch.cuda.is_available():
        return ["", "task=plan model=smolvlm", "-m adapter.r=4,8 trainer.max_steps=40"]
    free = torch.cuda.mem_get_info()[0] / GIB
    model = next((name for name, least in MODELS.items() if free >= least), "smolvlm_256m")
    commands = ["", f"task=plan model={model} trainer.memory_budget={max(int(free), 1)}GiB"]
    commands.append(f"model={model} data=files data.folder=my_pairs trainer.learning_rate=5e-5")
    many = torch.cuda.device_count()
    return [*commands, "-m hydra/launcher=parallel adapter.r=4,8,16"] if many > 1 else commands


def attempt(name: str, check: Callable[[], Finding], verdict: str, fix: str) -> Finding:
    """Run a check; an exception becomes a finding, never a traceback."""
    logging.disable(logging.WARNING)  # upstream's advice would tear the table apart
    try:
        with warnings.catch_warnings(action="ignore"):
            return check()
    except Exception as error:  # whatever upstream raises becomes one line
        return Finding(name, verdict, f"{type(error).__name__}: {str(error)[:200]}", fix)
    finally:
        logging.disable(logging.NOTSET)


def line(finding: Finding, width: int, colour: bool) -> str:
    """A finding on one line: verdict, name, detail, and the fix after an arrow."""
    mark = f"{COLOURS[finding.verdict]}{finding.verdict:<4}\033[0m" if colour else f"{finding.verdict:<4}"
    fix = f"  -> {finding.fix}" if finding.fix else ""
    return f"{mark}  {finding.name:<{width}}  {' '.join(finding.detail.split())}{fix}"


def judge(name: str, good: bool, detail: str, fix: str, otherwise: str = "fail") -> Finding:
    """ok without a fix when `good`, else the other verdict with it."""
    return Finding(name, "ok", detail) if good else Finding(name, otherwise, detail, fix)


def check_python() -> Finding:
    needs = ".".join(map(str, PYTHON))
    good, detail = sys.version_info >= PYTHON, f"{platform.python_version()} (needs {needs} or newer)"
    return judge("python", good, detail, f"make a virtual environment with Python {needs} or newer")


def requirements() -> list[Any]:
    """What every run needs, with the bounds in the installed package's metadata."""
    from packaging.requirements import Requirement

    parsed = [Requirement(need) for need in metadata.requires("smolvlm-exp") or []]
    return [r for r in parsed if not r.marker or r.marker.evaluate({"extra": ""})]


def check_packages() -> Finding:
    """Missing or older than its lower bound: fail. Past its upper bound: untested, so warn."""
    seen, wrong, verdict = [], {}, "warn"
    for need in requirements():
        version = next((installed.version for installed in metadata.distributions(name=need.name)), "")
        broken = {s.operator for s in need.specifier if version and not s.contains(version, prereleases=True)}
        if broken or not version:
            wrong[f"'{need}'"] = f"{need.name} {version} is outside {need.specifier}" if version else f"no {need.name}"
            verdict = verdict if version and broken <= {"<", "<=", "!="} else "fail"
        seen.append(f"{need.name} {version}")
    detail = "; ".join(wrong.values()) or ", ".join(seen)
    return judge("packages", not wrong, detail, f"pip install {' '.join(wrong)}", verdict)


def check_imports() -> Finding:
    """An import may break although the versions agree, as with a torchvision that was built for another torch."""
    check_torchvision()
    from peft import LoraConfig
    from transformers import Idefics3ForConditionalGeneration
    from trl import DPOTrainer

    upstream = (Idefics3ForConditionalGeneration, LoraConfig, DPOTrainer)
    return Finding("imports", "ok", ", ".join(name.__name__ for name in upstream))


def normal(*shape: int, seed: int) -> Any:
    """Normal numbers, the same for every device, drawn without touching the global generator."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Any, wanted: Any) -> float:
    return ((got.detach().cpu().double() - wanted.double()).norm() / wanted.double().norm()).item()


def check_matmul(name: str, dtype: str) -> Finding:
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "bf16" and not has("bf16"):
        used = "float32 is used on a CPU" if where == "cpu" else "this card has none: float16 is used, its loss scaled"
        return Finding(name, "ok", used)
    a, b = (normal(256, 256, seed=seed).to(getattr(torch, dtype)) for seed in range(2))
    error = relative_error(a.to(where) @ b.to(where), a.double() @ b.double())
    detail = f"{dtype} on {where}, relative error {error:.0e} (limit {MATMUL_LIMIT:.0e})"
    return judge(name, error <= MATMUL_LIMIT, detail, f"reinstall torch, {NO_GPU}")


def check_cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        fix = "a newer driver, or CUDA_VISIBLE_DEVICES" if torch.version.cuda else "install a torch built for CUDA"
        if torch.backends.mps.is_available():
            return Finding(
                "cuda", "ok", "Apple's GPU is not used, since bitsandbytes and the engine have no code for it"
            )
        absent = not shutil.which("nvidia-smi")
        detail = "no GPU" if absent else f"nvidia-smi is here, but torch {torch.__version__} sees no GPU"
        return judge("cuda", absent, f"{detail}: the CPU is used", fix, "warn")
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    detail = f"{torch.cuda.get_device_name()} (1 of {torch.cuda.device_count()}), capability {major}.{minor}, "
    detail += f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if torch.version.hip:
        return Finding("cuda", "warn", f"{detail}; nothing was ever tried on AMD's", "trainer.engine=stock if it fails")
    return judge("cuda", free >= 2 * GIB, detail, "end what else uses the card: `nvidia-smi` lists it", "warn")


def check_nf4() -> Finding:
    """The recipe's 4-bit layer (nf4, blocks of 64, double quantisation) against its float answer, forwards and back."""
    import torch
    from bitsandbytes.nn import Linear4bit

    from smolvlm_exp.models.model import resolve_dtype

    weight, x, grad = normal(256, 256, seed=0), normal(64, 256, seed=1), normal(64, 256, seed=2)
    where, compute = "cuda" if torch.cuda.is_available() else "cpu", resolve_dtype("auto")
    layer: Any = Linear4bit(256, 256, bias=False, compute_dtype=compute, compress_statistics=True, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to(where)  # this quantises
    layer.support_avx512bf16_for_cpu = False  # else the first eval forward repacks the weight, and DoRA is wrong later
    with torch.no_grad():
        evaluated = layer.eval()(x.to(where))
    inputs = x.to(where).requires_grad_()
    trained = layer.train()(inputs)
    trained.backward(grad.to(where))
    errors = {"eval": relative_error(evaluated, x @ weight.T), "train": relative_error(trained, x @ weight.T)}
    errors["gradient"] = relative_error(inputs.grad, grad @ weight)
    listed = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
    detail = f"on {where}, relative error: {listed} (limit {NF4_LIMIT}), blocks of {layer.weight.quant_state.blocksize}"
    good = layer.weight.quant_state.blocksize == 64 and all(error <= NF4_LIMIT for error in errors.values())
    return judge("nf4", good, detail, "reinstall bitsandbytes, or run without 4 bit: quant=none")


def check_flash_attention() -> Finding:
    import torch

    installed = util.find_spec("flash_attn") is not None
    if not installed or not torch.cuda.is_available():
        return Finding("flash-attn", "ok", f"{'no GPU' if installed else 'not installed'}: sdpa is used")
    from flash_attn import flash_attn_func

    q, k, v = (normal(1, 64, 4, 64, seed=seed).bfloat16() for seed in range(3))
    got = flash_attn_func(q.cuda(), k.cuda(), v.cuda(), causal=True).transpose(1, 2)
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    error = relative_error(got, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    detail = f"relative error {error:.0e} (limit {MATMUL_LIMIT:.0e})"
    return judge("flash-attn", error <= MATMUL_LIMIT, detail, "pip uninstall flash-attn, or rebuild it", "warn")


def check_images() -> Finding:
    from PIL import Image, ImageChops

    ramp = Image.linear_gradient("L")
    image = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))
    worst = []
    for kind in ("PNG", "JPEG"):
        stored = io.BytesIO()
        image.save(stored, kind)
        back: Any = ImageChops.difference(image, Image.open(stored).convert("RGB")).getextrema()
        worst.append(max(high for _, high in back))
    image.resize((64, 48), Image.Resampling.LANCZOS)
    detail = f"PNG off by {worst[0]} of 255 (limit 0), JPEG by {worst[1]} (limit 24)"
    return judge("images", worst[0] == 0 and worst[1] <= 24, detail, "reinstall pillow")


def check_memory() -> Finding:
    """RAM that is available, under a container's limit where there is one (psutil sees the host's)."""
    import psutil

    available, cgroup = psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.max")
    with suppress(OSError, ValueError):  # no such file; no limit ("max")
        available = min(available, int(cgroup.read_text()))
    detail = f"{available / GIB:.1f} GiB of RAM available, {os.cpu_count()} cores"
    return judge("memory", available >= 4 * GIB, detail, "close other programs: 4 GiB is comfortable", "warn")


def check_folder(name: str, folder: Path) -> Finding:
    """Write, fsync and delete a small file in `folder`, or in the nearest ancestor that exists."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
        file.write(bytes(1 << 16))
        file.flush()
        os.fsync(file.fileno())
    free = shutil.disk_usage(there).free / GIB
    detail = f"{free:.1f} GiB free at {there}, writable"
    return judge(name, free >= 5, detail, "make room: 5 GiB is comfortable", "warn")


def check_hub() -> Finding:
    """One HEAD request by the client that downloads."""
    from huggingface_hub import constants

    answer = ping(HUB_SECONDS)
    cached = sum(1 for _ in Path(constants.HF_HUB_CACHE).glob("models--*"))
    fix = "nothing for the embedded default, which needs no hub; what the cache holds can be used"
    return judge("hub", answer.startswith(("HTTP 2", "HTTP 3")), f"{answer}; {cached} models in the cache", fix, "warn")


def check_wandb() -> Finding:
    """Where runs are uploaded to. Without `wandb.login`, which uses the network even with `verify=False`."""
    try:
        with redirect_stderr(io.StringIO()):  # a complaint about ~/.netrc may quote the key
            from wandb.sdk import wandb_setup
            from wandb.sdk.lib import wbauth

            settings = wandb_setup.singleton().settings
            mode = os.environ.get("WANDB_MODE") or settings.mode
            key = os.environ.get("WANDB_API_KEY") or wbauth.read_netrc_auth(host=settings.base_url) or settings.api_key
            wrong = key and wbauth.check_api_key(key)
    except Exception as error:  # only its kind is printed: the message may quote the key
        return Finding("w&b", "warn", f"cannot be used ({type(error).__name__})", "`wandb login`, or tracker=none")
    if mode != "online":
        return Finding("w&b", "ok", f"{mode}, as you chose")
    account = bool(key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")) and not wrong
    detail = "online: logged in" if account else "offline: " + ("the key has the wrong form" if wrong else "no account")
    return judge("w&b", account, detail, "`wandb login` to see runs online", "warn")
