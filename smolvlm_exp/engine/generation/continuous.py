"""Rows that are decoded together while others enter and leave; each has its own prompt, sampling and seed.

The active rows are the first ones of buffers that do not move, so that a step on a GPU is one of a few CUDA graphs, for
1, 2, 4, ... rows. A row that leaves is replaced by the last one. Buffers grow to what was needed at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from smolvlm_exp.engine.generation.batch import step_attention
from smolvlm_exp.engine.generation.decoder import Decoder, rotated_heads
from smolvlm_exp.engine.generation.sampling import Sampling, draw_rows, uniforms
from smolvlm_exp.engine.memory.probe import free_memory

SMALLEST = 1, 256, 64  # buffers: rows, tokens of a prompt, tokens of an answer; they grow by doubling
USABLE = 0.8  # of the free memory: the rest is for prompts that are read

Past = tuple[Any, ...]  # arrays (any, kv heads, tokens, size): keys and values of tokens that were read


@dataclass(frozen=True)
class Request:
    """What a row begins with: the tokens that are still to be read of its prompt, and how its answer is drawn."""

    ids: list[int]  # at least one
    sampling: Sampling
    past: Past = ()  # of the tokens before, as `leave` has returned it
    image_at: list[int] = field(default_factory=list)  # places among `ids` of image tokens, in order
    features: list[Any] = field(default_factory=list)  # that replace the embeddings of those, (n, H) per image

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return past_length(self.past) + len(self.ids)


def past_length(past: Past) -> int:
    """In tokens."""
    return past[0].shape[2] if past else 0


@dataclass
class Row:
    prompt: int  # tokens
    sampling: Sampling
    drawn: int = 1  # tokens of its answer


class Buffers:
    """What rows keep on the device. A row's columns hold anything while it is free."""

    def __init__(self, decoder: Decoder, rows: int, longest: int, count: int) -> None:
        """
        Args:
            longest, count: tokens of the longest prompt and of the longest answer.
        """
        like: dict = {"dtype": decoder.dtype, "device": decoder.device}
        layers, (_, heads), size, device = len(decoder.layers), decoder.heads, decoder.head_dim, decoder.device
        self.size = rows, longest, count
        self.prompt = torch.zeros(2, layers, rows, heads, longest, size, **like)  # keys and values
        self.own = torch.zeros(2, layers, rows, heads, count, size, **like)  # of the answers' tokens
        self.lengths = torch.ones(rows, dtype=torch.int64, device=device)  # of prompts
        self.drawn = torch.ones(rows, dtype=torch.int64, device=device)  # tokens so far
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)  # the last of them
        self.uniforms = torch.zeros(rows, count, device=device)
        self.sampling = torch.zeros(rows, 4, device=device)  # temperature, top_p, top_k, min_new_tokens

    def copy(self, to: int, source: "Buffers", row: int, length: int, drawn: int) -> None:
        """Row `row` of `source`, whose prompt has `length` tokens, becomes row `to`."""
        self.prompt[:, :, to, :, :length] = source.prompt[:, :, row, :, :length]
        self.own[:, :, to, :, :drawn] = source.own[:, :, row, :, :drawn]
        self.uniforms[to, : source.uniforms.shape[1]] = source.uniforms[row]
        for name in ("lengths", "drawn", "token", "sampling"):
            getattr(self, name)[to] = getattr(source, name)[row]


class ContinuousBatch:
    def __init__(self, decoder: Decoder, end: int) -> None:
        """`end`: id of the token that ends an answer, which `Sampling.min_new_tokens` holds back."""
        self.decoder, self.end = decoder, end
        self.runs_ahead = decoder.device.type == "cuda"  # a next step may be begun before a step's tokens are read
        self.clear()

    def clear(self) -> None:
        """Free all rows and their memory."""
        self.rows = list[Row]()
        self.graphs: dict[tuple[int, bool, bool], torch.cuda.CUDAGraph] = {}
        self.buffers = Buffers(self.decoder, *SMALLEST)

    # Memory

    def room(self, lengths: Sequence[int], counts: Sequence[int]) -> tuple[int, int, int]:
        """The buffers' size with further rows, of prompts of `lengths` tokens and answers of up to `counts`."""
        needed = len(self.rows) + len(lengths), max(lengths), max(counts)
        rows, longest, count = (
            max(have, 1 << (need - 1).bit_length()) for have, need in zip(self.buffers.size, needed, strict=True)
        )
        return rows, longest, count

    def fits(self, lengths: Sequence[int], counts: Sequence[int]) -> bool:
        """Whether further rows have a place in memory, now."""
        room = self.room(lengths, counts)
        return room == self.buffers.size or self.bytes(room) <= USABLE * free_memory(self.decoder.device)

    def bytes(self, size: tuple[int, int, int]) -> int:
        rows, longest, count = size
        decoder = self.decoder
        per_token = 2 * len(decoder.layers) * decoder.heads[1] * decoder.head_dim * decoder.dtype.itemsize
        return rows * (longest + count) * per_token

    def make_room(self, requests: Sequence[Request]) -> None:
        size = self.room([r.length for r in requests], [r.sampling.max_new_tokens for r in requests])
        if size == self.buffers.size:
            return
        self.graphs.clear()
        larger = Buffers(self.decoder, *size)
        for number, row in enumerate(self.rows):
            larger.copy(number, self.buffers, number, row.prompt, row.drawn)
        self.buffers = larger

    # Rows

    @torch.no_grad()
    def enter(self, requests: Sequence[Request]) -> list[int]:
        """Read prompts in one pass, as further rows; their first tokens. After an error the batch is as it was."""
        self.make_room(requests)
        first = len(self.rows)
        for row, request in enumerate(requests, start=first):
            self.place(row, request)
        logits = self.decoder.logits(self.read(first, requests))
        self.draw(slice(first, first + len(requests)), logits, [request.sampling for request in requests])
        tokens = self.buffers.token[first : first + len(requests)].tolist()
        self.rows += [Row(request.length, request.sampling) for request in requests]
        return tokens

    def place(self, row: int, request: Request) -> None:
        buffers, sampling, past = self.buffers, request.sampling, past_length(request.past)
        if past:
            buffers.prompt[:, :, row, :, :past] = request.past[0].unflatten(0, (2, -1))
        count = sampling.max_new_tokens
        buffers.uniforms[row, :count] = uniforms([sampling.seed], count)[0].to(self.decoder.device)
        buffers.lengths[row], buffers.drawn[row] = request.length, 0
        settings = sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_new_tokens
        buffers.sampling[row] = torch.tensor(settings, device=self.decoder.device)

    def read(self, first: int, requests: Sequence[Request]) -> torch.Tensor:
        """(requests, H) the last hidden state of each; keys and values go into rows `first`, ... of the buffers."""
        decoder, device = self.decoder, self.decoder.device
        counts, pasts = [len(r.ids) for r in requests], [past_length(r.past) for r in requests]
        starts = [0, *accumulate(counts)]
        hidden = decoder.embed(torch.tensor([*chain(*(r.ids for r in requests))], device=device))
        places = [start + at for start, request in zip(starts, requests, strict=False) for at in request.image_at]
        if places:
            features = torch.cat([*chain(*(r.features for r in requests))]).to(hidden)
            hidden = hidden.index_copy(0, torch.tensor(places, device=device), features)
        positions = torch.cat([
            torch.arange(past, past + count, device=device) for past, count in zip(pasts, counts, strict=True)
        ])  # fmt: skip
        masks = [
            torch.ones(count, past + count, dtype=torch.bool, device=device).tril(past) if past else None
            for past, count in zip(pasts, counts, strict=True)
        ]
        options: Any = {"scale": decoder.scale, "enable_gqa": decoder.heads[0] != decoder.heads[1]}

        def attend(layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            queries, *new = (part.transpose(0, 1) for part in rotated_heads(qkv, cos, sin, decoder.heads))
            results = []
            for row, (start, end) in enumerate(pairwise(starts)):
                past, mask, stored = pasts[row], masks[row], self.buffers.prompt[:, layer, first + row]
                for buffer, part in zip(stored, new, strict=True):
                    buffer[:, past : past + end - start] = part[:, start:end]
                key, value = stored[:, None, :, : past + end - start]
                query = queries[None, :, start:end]
                results.append(
                    F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, **options)[0]
                )
            return torch.cat(results, dim=1).transpose(0, 1).flatten(1)

        return decoder(hidden, positions, attend)[torch.tensor(starts[1:], device=device) - 1]

    def leave(self, row: int, read: int) -> Past:
        """Free a row; the last one takes its place.

        Args:
            read: how many tokens of its answer were read, all but the last.

        Returns:
            One tensor (2 x layers, kv heads, tokens, size): the keys, then the values, of its prompt and those tokens.
        """
        buffers, length, last = self.buffers, self.rows[row].prompt, len(self.rows) - 1
        parts = buffers.prompt[:, :, row, :, :length], buffers.own[:, :, row, :, :read]
        past = torch.cat(parts, dim=3).flatten(0, 1)
        if row != last:
            self.rows[row] = self.rows[last]
            buffers.copy(row, buffers, last, self.rows[row].prompt, self.rows[row].drawn)
        self.rows.pop()
        return (past,)

    # Tokens

    @torch.no_grad()
    def step(self) -> Callable[[], list[int]]:
        """Begin a token for every row. Returns a function that waits for them and gives them."""
        samplings = [row.sampling for row in self.rows]
        count = len(self.rows)
        if self.decoder.device.type == "cuda":
            self.replay(1 << (count - 1).bit_length(), samplings)
        else:
            self.decode(count, max(row.prompt for row in self.rows), max(row.drawn for row in self.rows), samplings)
        for row in self.rows:
            row.drawn = min(row.drawn + 1, row.sampling.max_new_tokens)  # a row may be one step late in leaving
        return self.fetch(count)

    def fetch(self, count: int) -> Callable[[], list[int]]:
        if self.decoder.device.type != "cuda":
            there = self.buffers.token[:count].tolist()
            return lambda: there
        tokens = torch.empty(count, dtype=torch.int64, pin_memory=True)
        tokens.copy_(self.buffers.token[:count], non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> list[int]:
            copied.synchronize()
            return tokens.tolist()

        return wait

    def replay(self, rows: int, samplings: Sequence[Sampling]) -> None:
        """A step of the first `rows` rows, free ones among them, as a graph from its second time on."""
        _, longest, count = self.buffers.size
        key = rows, any(s.temperature for s in samplings), any(s.truncates for s in samplings)
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self.decode(rows, longest, count, samplings)  # compiles and allocates what a capture may not
        if not self.decoder.can_be_captured:
            return
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.decode(rows, longest, count, samplings)
        self.graphs[key] = graph

    def decode(self, rows: int, longest: int, count: int, samplings: Sequence[Sampling]) -> None:
        """A token for the first `rows` rows, which look at the first `longest` keys of prompts and `count` of answers.

        What a free row does is never read; it stays within the buffers.
        """
        decoder, buffers = self.decoder, self.buffers
        lengths, at = buffers.lengths[:rows], (buffers.drawn[:rows] - 1).clamp(0, buffers.size[2] - 1)

        def attend(layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            prompt, own = buffers.prompt[:, layer, :rows, :, :longest], buffers.own[:, layer, :rows, :, :count]
            return step_attention(qkv, cos, sin, prompt, own, lengths, at, decoder.scale, decoder.heads)

        hidden = decoder(decoder.embed(buffers.token[:rows]), lengths + at, attend)
        self.draw(slice(0, rows), decoder.logits(hidden), samplings)

    def draw(self, rows: slice, logits: torch.Tensor, samplings: Sequence[Sampling]) -> None:
        """Add a token to each of `rows`, from (rows, vocabulary) logits. `samplings`: of those that are not free."""
        buffers = self.buffers
        drawn = buffers.drawn[rows]
        temperature, top_p, top_k, least = buffers.sampling[rows].unbind(1)
        logits[:, self.end] = torch.where(drawn < least, -torch.inf, logits[:, self.end])
        if any(sampling.temperature for sampling in samplings):
            at = drawn.clamp(max=buffers.size[2] - 1)[:, None]
            uniform = buffers.uniforms[rows].gather(1, at)[:, 0]
            truncates = any(sampling.truncates for sampling in samplings)
            buffers.token[rows] = draw_rows(logits, uniform, temperature, top_p, top_k, truncates)
        else:
            buffers.token[rows] = logits.argmax(1)
        buffers.drawn[rows] = drawn + 1
