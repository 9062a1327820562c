"""What clients get of task=serve, 1 to 64 of them at a time, and one chat beside transformers' `generate`.

    python -m benchmarks.serving --model tiny --tokens 8
    python -m benchmarks.serving --model smolvlm --dtype bfloat16 --tokens 128     random weights in the real shape

Server and clients share a process and talk over loopback. Every request has an image that no other one has.
"""

import argparse
import asyncio
import base64
import io
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from benchmarks.setting import compose, device_name
from smolvlm_exp.data.messages import user
from smolvlm_exp.deploy.options import ServeConfig
from smolvlm_exp.deploy.server.app import Service, build_app
from smolvlm_exp.deploy.server.connections import listen
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.tasks.chat import load_session

CLIENTS = (1, 4, 16, 64)
QUESTION = "What is in the picture?"
SIZE = 512, 384
ROUNDS = 3  # of chat's and `generate`'s answers; the best counts


@dataclass
class Timed:
    """One request. Seconds; `first` is None where it was refused."""

    first: float | None
    total: float
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--most", type=int, default=CLIENTS[-1], help="clients at a time, at most")
    parser.add_argument(
        "--requests", type=int, default=96, help="for each number of clients; at least 3 for each of them"
    )
    options = parser.parse_args()
    weights = "pretrained" if options.model == "tiny" else "random"
    config = compose(
        "task=serve", f"model={options.model}", f"model.weights={weights}", f"model.dtype={options.dtype}", "quant=none"
    )
    session = load_session(config, config.serve.max_concurrency)
    print(f"{options.model}, {options.dtype}, {options.tokens} tokens, images of {SIZE[0]} x {SIZE[1]}; "
          f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    serving(session, config.serve, options)
    chatting(session, options.tokens)
    session.close()


def serving(session: SmolVLMSession, limits: ServeConfig, options: argparse.Namespace) -> None:
    print("\n| clients | answers/s | tokens/s | latency, median s | p95 s | first token, median s | refused |")
    print("|---|---|---|---|---|---|---|")
    limits.max_tokens = max(limits.max_tokens, options.tokens)
    with server(session, limits) as address:
        asyncio.run(ask(address, [body(i, options.tokens) for i in range(32)], clients=16))  # compiles what a GPU needs
        for clients in (count for count in CLIENTS if count <= options.most):
            requests = max(3 * clients, options.requests if clients > 1 else options.requests // 4)
            bodies = [body(clients * 10_000 + i, options.tokens) for i in range(requests)]
            begun = time.perf_counter()
            timed = asyncio.run(ask(address, bodies, clients))
            seconds = time.perf_counter() - begun
            answered = [one for one in timed if one.first is not None]
            latencies = sorted(one.total for one in answered)
            cells = [
                f"{len(answered) / seconds:.2f}", f"{sum(one.tokens for one in answered) / seconds:.1f}",
                f"{statistics.median(latencies):.3f}", f"{latencies[int(0.95 * (len(latencies) - 1))]:.3f}",
                f"{statistics.median(one.first or 0.0 for one in answered):.3f}", str(len(timed) - len(answered)),
            ]  # fmt: skip
            print(f"| {clients} | {' | '.join(cells)} |", flush=True)


@contextmanager
def server(session: SmolVLMSession, limits: ServeConfig) -> Iterator[str]:
    listening = listen("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(build_app(session, limits, Service({"benchmark": ""})), log_level="error"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join()
    listening.close()


def picture(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(SIZE)


def body(number: int, tokens: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, format="JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    options = {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({"messages": [{"role": "user", "content": content}], **options}).encode()


async def ask(address: str, bodies: list[bytes], clients: int) -> list[Timed]:
    """All of `bodies`, by clients that each send one after another."""
    waiting, timed = list(bodies), list[Timed]()
    connections = httpx.Limits(max_connections=clients)

    async def client(http: httpx.AsyncClient) -> None:
        while waiting:
            timed.append(await one(http, waiting.pop()))

    async with httpx.AsyncClient(base_url=address, timeout=None, limits=connections) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return timed


async def one(http: httpx.AsyncClient, content: bytes) -> Timed:
    begun, first, tokens = time.perf_counter(), None, 0
    headers = {"Content-Type": "application/json"}
    async with http.stream("POST", "/v1/chat/completions", content=content, headers=headers) as response:
        if response.status_code == 429:
            return Timed(None, time.perf_counter() - begun, 0)
        response.raise_for_status()
        async for line in response.aiter_lines():
            if first is None and '"content": "' in line and '"role"' not in line:
                first = time.perf_counter() - begun
            if '"usage"' in line:
                tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    total = time.perf_counter() - begun
    return Timed(total if first is None else first, total, tokens)


class Stopwatch(BaseStreamer):
    """When transformers' `generate` gives it each token."""

    def __init__(self) -> None:
        self.times = list[float]()

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def chatting(session: SmolVLMSession, tokens: int) -> None:
    """Seconds from an image and a question to the first token, and tokens per second after it."""
    images = (picture(number) for number in range(10**6, 2 * 10**6))
    model, processor = session.model.model, session.processor

    def chat() -> tuple[float, list[float]]:
        begun, times = time.perf_counter(), list[float]()
        answer = session.conversation().say(QUESTION, [next(images)], Sampling(max_new_tokens=tokens))
        for _ in answer:
            times.append(time.perf_counter())
        return begun, times

    def generate() -> tuple[float, list[float]]:
        begun, watch = time.perf_counter(), Stopwatch()
        text = processor.apply_chat_template([user(QUESTION, 1)], add_generation_prompt=True)
        inputs = processor(text=text, images=[[next(images)]], add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=session.prompts.end, streamer=watch
        )
        return begun, watch.times[1:]  # the first is the prompt

    print("\n| one chat | first token, s | tokens/s |\n|---|---|---|")
    for name, run in (("session", chat), ("transformers' generate", generate)):
        timed = [run() for _ in range(ROUNDS + 1)][1:]
        first = min(times[0] - begun for begun, times in timed)
        rate = max((len(times) - 1) / (times[-1] - times[0]) for _, times in timed)
        print(f"| {name} | {first:.4f} | {rate:.1f} |")


if __name__ == "__main__":
    main()
