"""The rows that are sampled together: their keys, values and tokens in buffers that never move.

A *group* is one prompt with its answers, a row each. The prompt's keys and values exist once; each row has room for its
own behind them. Since nothing moves, a step on a GPU is captured as a CUDA graph once and replayed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from smolvlm_exp.engine.generation.decoder import Decoder, rotated_heads
from smolvlm_exp.engine.generation.sampling import COLDEST, Sampling, draw, tempered, uniforms
from smolvlm_exp.engine.layers.ops import uses_kernels

try:
    from smolvlm_exp.engine.generation import kernels
except ImportError:  # no Triton
    kernels = None  # type: ignore[assignment]


class SamplingBatch:
    """G groups of n rows each; a group is free until `read` gives it a prompt."""

    def __init__(
        self,
        decoder: Decoder,
        groups: int,
        answers: int,
        longest: int,
        sampling: Sampling,
        end: int,
        keep_logps: bool = False,
    ) -> None:
        """
        Args:
            answers: n; longest: tokens of the longest prompt that will be read.
            end: id of the token that ends an answer.
        """
        self.decoder, self.answers, self.sampling, self.end = decoder, answers, sampling, end
        count, rows = sampling.max_new_tokens, groups * answers
        like: dict = {"dtype": decoder.dtype, "device": decoder.device}
        layers, (_, heads), size = len(decoder.layers), decoder.heads, decoder.head_dim
        self.shared = torch.zeros(2, layers, groups, heads, longest, size, **like)  # keys and values of prompts
        self.own = torch.zeros(2, layers, rows, heads, count, size, **like)  # of the rows' own tokens
        self.lengths = torch.ones(groups, dtype=torch.int64, device=decoder.device)  # of prompts
        # One column more: what an ended row goes on to write is never read.
        self.tokens = torch.zeros(rows, count + 1, dtype=torch.int64, device=decoder.device)
        self.logps = torch.zeros(rows, count + 1, device=decoder.device) if keep_logps else None
        self.uniforms = torch.zeros(rows, count + 1, device=decoder.device)
        self.drawn = torch.ones(rows, dtype=torch.int64, device=decoder.device)  # tokens so far
        self.ended = torch.ones(rows, dtype=torch.bool, device=decoder.device)
        self.widths = longest, count  # keys that a step looks at: of the prompt, of the row's own
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def groups(self) -> int:
        return len(self.lengths)

    def read(self, groups: list[int], embeddings: torch.Tensor, lengths: list[int], seeds: Sequence[int]) -> None:
        """Give free groups their prompts, and draw each row's first token.

        Args:
            embeddings: (len(groups), longest of them, H), padded on the right; seeds: one for each row.
        """
        device, (count, longest) = self.decoder.device, embeddings.shape[:2]
        places, ends = torch.tensor(groups, device=device), torch.tensor(lengths, device=device)
        rows = (places[:, None] * self.answers + torch.arange(self.answers, device=device)).flatten()

        def attend(layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            heads = rotated_heads(qkv, cos, sin, self.decoder.heads)
            query, key, value = (part.unflatten(0, (count, longest)).transpose(1, 2) for part in heads)
            for buffer, part in zip(self.shared[:, layer], (key, value), strict=True):
                buffer[places, :, :longest] = part
            gqa = query.shape[1] != key.shape[1]
            options = {"is_causal": True, "scale": self.decoder.scale, "enable_gqa": gqa}
            return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).flatten(0, 1).flatten(1)

        positions = torch.arange(longest, device=device).repeat(count)
        hidden = self.decoder(embeddings.flatten(0, 1), positions, attend).unflatten(0, (count, longest))
        last = hidden[torch.arange(count, device=device), ends - 1]
        self.lengths[places] = ends
        self.uniforms[rows] = uniforms(seeds, self.uniforms.shape[1]).to(device)
        self.drawn[rows], self.ended[rows] = 0, False
        self.draw(rows, self.decoder.logits(last).repeat_interleave(self.answers, 0))

    def advance(self, steps: int) -> None:
        """A token for each row that has not ended; on a GPU `steps` of them."""
        if self.decoder.device.type != "cuda":
            self.widths = int(self.lengths.max()), int(self.drawn.max())
            self.step()
            return
        for _ in range(steps):
            if self.graph is not None:
                self.graph.replay()
                continue
            self.step()  # compiles and allocates what a capture may not
            if not self.decoder.can_be_captured:
                continue
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()

    def step(self) -> None:
        at = self.drawn - 1  # the place of the token that is read now
        hidden = self.decoder.embed(self.tokens.gather(1, at[:, None])[:, 0])
        positions = self.lengths.repeat_interleave(self.answers) + at

        def attend(layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            prompt, width = self.widths
            shared, own = self.shared[:, layer, ..., :prompt, :], self.own[:, layer, ..., :width, :]
            scale, heads = self.decoder.scale, self.decoder.heads
            return step_attention(qkv, cos, sin, shared, own, self.lengths, at, scale, heads)

        rows = torch.arange(len(at), device=at.device)
        self.draw(rows, self.decoder.logits(self.decoder(hidden, positions, attend)))

    def draw(self, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Add a token to each of `rows`, from its (rows, vocabulary) logits; an ended row stays as it is."""
        sampling, drawn = self.sampling, self.drawn[rows]
        if sampling.min_new_tokens:
            early = drawn < sampling.min_new_tokens
            logits[:, self.end] = torch.where(early, -torch.inf, logits[:, self.end])
        for token in sampling.suppress:
            logits[:, token] = -torch.inf
        tokens = draw(logits, self.uniforms[rows, drawn], sampling)
        if self.logps is not None:
            scaled = tempered(logits, max(sampling.temperature, COLDEST)) if sampling.temperature else logits
            self.logps[rows, drawn] = scaled.log_softmax(1).gather(1, tokens[:, None])[:, 0]
        self.tokens[rows, drawn] = tokens
        drawn = drawn + ~self.ended[rows]
        self.drawn[rows] = drawn
        self.ended[rows] |= (tokens == self.end) | (drawn == sampling.max_new_tokens)

    def ended_groups(self) -> list[bool]:
        """Whether every row of a group has ended; waits for the device."""
        return self.ended.view(self.groups, self.answers).all(1).tolist()

    def answers_of(self, group: int) -> list[tuple[list[int], bool, torch.Tensor | None]]:
        """Of each row: its tokens without the end token, whether that came, and log-probs where they are kept."""
        answers = []
        for row in range(group * self.answers, (group + 1) * self.answers):
            count = int(self.drawn[row])
            ids = self.tokens[row, :count].tolist()
            ended = ids[-1] == self.end
            logps = self.logps[row, :count].cpu() if self.logps is not None else None
            answers.append((ids[:-1] if ended else ids, ended, logps))
        return answers

    def can_shrink(self, active: int) -> bool:
        """Where fewer rows are less work: on a CPU. A GPU's step takes its time for the weights it reads."""
        return self.decoder.device.type != "cuda" and 2 * active <= self.groups

    def shrink(self, groups: list[int]) -> None:
        """Go on with these groups alone, in this order."""
        places = torch.tensor(groups, device=self.decoder.device)
        rows = (places[:, None] * self.answers + torch.arange(self.answers, device=places.device)).flatten()
        self.shared, self.own = self.shared[:, :, places], self.own[:, :, rows]
        self.lengths = self.lengths[places]
        self.tokens, self.uniforms, self.drawn, self.ended = (
            part[rows] for part in (self.tokens, self.uniforms, self.drawn, self.ended)
        )
        self.logps = None if self.logps is None else self.logps[rows]


def step_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shared: torch.Tensor, own: torch.Tensor,
    lengths: torch.Tensor, at: torch.Tensor, scale: float, heads: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """softmax(scale q K^T) V over a prompt's keys, which n rows share, and each row's own behind them.

    The row's new key and value are written into `own` at `at`, and are the last that it looks at.

    Args:
        qkv: (G n, (Q + 2 K) D); cos, sin: (G n, D) of the new tokens' positions; heads: (Q, K), of which K may be
            fewer (GQA).
        shared: (2, G, K, P, D) keys and values of the prompts, the first `lengths` (G,) of each.
        own: (2, G n, K, N, D).

    Returns:
        (G n, Q D).
    """
    if uses_kernels(qkv) and cos.shape[1] >= 32:  # a kernel's products need 16 columns a half
        return kernels.step_attention(qkv, cos, sin, shared, own, lengths, at, scale, heads)
    query, *new = rotated_heads(qkv, cos, sin, heads)
    rows, (_, groups, kv_heads, prompt, size) = len(qkv), shared.shape
    for buffer, part in zip(own, new, strict=True):
        buffer[torch.arange(rows, device=at.device), :, at] = part
    (key, value), (own_key, own_value), n = shared, own, rows // groups
    own_query = query.view(rows, kv_heads, -1, size)  # (G n, K, Q / K, D)
    group_query = own_query.unflatten(0, (groups, n)).transpose(1, 2)  # (G, K, n, Q / K, D)
    to_prompt = (group_query.flatten(2, 3) @ key.transpose(2, 3)).view(*group_query.shape[:4], prompt)
    to_own = (own_query @ own_key.transpose(2, 3)).unflatten(0, (groups, n)).transpose(1, 2)
    in_prompt = torch.arange(prompt, device=at.device) < lengths[:, None]
    in_own = torch.arange(own.shape[3], device=at.device) <= at[:, None]
    to_prompt = to_prompt.masked_fill(~in_prompt[:, None, None, None], -torch.inf)
    to_own = to_own.masked_fill(~in_own.view(groups, 1, n, 1, -1), -torch.inf)
    weights = (torch.cat((to_prompt, to_own), dim=-1).float() * scale).softmax(-1).to(query.dtype)
    of_prompt = (weights[..., :prompt].flatten(2, 3) @ value).view(group_query.shape).transpose(1, 2)
    of_own = weights[..., prompt:].transpose(1, 2).flatten(0, 1) @ own_value
    return of_prompt.reshape(rows, -1) + of_own.reshape(rows, -1)
