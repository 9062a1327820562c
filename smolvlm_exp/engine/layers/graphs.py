"""A stack of fused layers as CUDA graphs: a pass is one launch, where the host needs longer than a small model for some
hundreds.

Graphs read and write where they did when they were captured, so what a pass is given is copied there. What belongs to
the adapters alone (`Product`) has a graph of its own, replayed once per optimiser step.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from smolvlm_exp.engine.layers.dora import ParameterVersion
from smolvlm_exp.engine.layers.fused_layer import FusedLayer, LayerContext, SavedActivations
from smolvlm_exp.engine.layers.linear import Product, active_adapter, workspaces

Tensors = dict[str, torch.Tensor]
ContextOf = Callable[[list[Product], Tensors], LayerContext]


class StackGraphs:
    """The graphs of one stack, which share one pool of memory: only one pass is under way at any time."""

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        self.layers = layers
        self.forget()

    def free(self) -> None:
        """Give all memory back; what is captured next begins anew."""
        if self.pool is not None:
            self.forget()
            torch.cuda.empty_cache()

    def forget(self) -> None:
        self.passes: dict[Any, Pass] = {}
        self.products: list[list[Product]] = []
        self.refresh: torch.cuda.CUDAGraph | None = None
        self.step: int | None = None  # that the products are of
        self.captured_from: Any = None
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None  # one: cuBLAS takes memory of its own for each
        self.held: list[torch.Tensor] = []

    def run(self, hidden: torch.Tensor, tensors: Tensors, shape: tuple[Any, ...], context_of: ContextOf) -> Any:
        """The last layer's result for `hidden`, (T, H), for autograd; None: the one before has not gone back yet.

        Args:
            tensors: whatever else of the batch the layers read; `shape`: what they do not read from tensors.
        """
        key = (hidden.shape, hidden.dtype, hidden.requires_grad, *shape, *(t.shape for t in tensors.values()))
        key = (*key, *(layer.checkpointing for layer in self.layers))
        if any(one.under_way for one in self.passes.values()):
            return None
        if key not in self.passes and any(len(hidden) > len(one.hidden) for one in self.passes.values()):
            self.free()  # so that the largest is captured first, and the others fit into its memory
        self.update(hidden.dtype)
        if key not in self.passes:
            self.passes[key] = Pass(self, hidden, tensors, context_of)
        anchor = next(p for products in self.products for product in products for p in product.parameters)
        return Replay.apply(self.passes[key], hidden, tensors, anchor)

    def update(self, dtype: torch.dtype) -> None:
        """The products of the adapters as they are now."""
        adapters = [active_adapter(layer) for fused in self.layers for layer in fused.linears[0].layers]
        captured = dtype, [adapter and adapter.a.data_ptr() for adapter in adapters]
        if self.captured_from != captured:
            self.free()
            self.captured_from = captured
        if self.step == ParameterVersion.steps:
            return
        self.step = ParameterVersion.steps
        if self.refresh is None:
            with self.captured() as self.refresh:
                self.products = [layer.fresh_products(dtype) for layer in self.layers]
        self.refresh.replay()

    @contextmanager
    def captured(self) -> Iterator[torch.cuda.CUDAGraph]:
        """What is launched within becomes a graph; nothing is computed yet."""
        if self.pool is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph, stream = torch.cuda.CUDAGraph(), self.stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.empty_cache()  # for the pool
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.cuda.stream(stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                yield graph
            except BaseException:
                with suppress(RuntimeError):  # that it failed is known
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self.held += workspaces()  # which a larger one may replace

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for products in self.products for product in products for p in product.parameters]


class Pass:
    """Forward and backward pass for one shape."""

    def __init__(self, graphs: StackGraphs, hidden: torch.Tensor, tensors: Tensors, context_of: ContextOf) -> None:
        self.parameters = graphs.parameters
        self.hidden, self.tensors = hidden.detach().clone(), {name: value.clone() for name, value in tensors.items()}
        contexts = [context_of(products, self.tensors) for products in graphs.products]
        steps: list[tuple[FusedLayer, LayerContext, SavedActivations]] = []
        self.owner: Any = None
        with graphs.captured() as self.forward:
            result = self.hidden
            for layer, context in zip(graphs.layers, contexts, strict=True):
                result, saved = layer.forward(result, context)
                steps.append((layer, context, saved))
        self.result, self.dresult = result, torch.empty_like(result)
        needs_input = hidden.requires_grad
        adapted = (i for i, products in enumerate(graphs.products) if any(product.parameters for product in products))
        lowest = 0 if needs_input else next(adapted)  # below it there is nothing to learn
        with graphs.captured() as self.backward:
            dhidden: torch.Tensor | None = self.dresult
            gradients: list[torch.Tensor] = []
            while len(steps) > lowest:
                layer, context, saved = steps.pop()
                assert dhidden is not None
                dhidden, own = layer.backward(saved, context, dhidden, len(steps) > lowest or needs_input)
                gradients = [*own, *gradients]
                del saved, own
            self.dhidden = dhidden if needs_input else None
            self.gradients = torch.cat([gradient.reshape(-1) for gradient in gradients])

    @property
    def under_way(self) -> bool:
        """Whether a forward pass's result is still in use, and its backward pass to come."""
        return self.owner is not None and self.owner() is not None


class Replay(torch.autograd.Function):
    """One `Pass` for autograd. Gradients of adapters are added here: to hand over hundreds takes longer than a pass."""

    @staticmethod
    def forward(ctx: Any, one: Pass, hidden: torch.Tensor, tensors: Tensors, anchor: torch.Tensor) -> torch.Tensor:
        one.hidden.copy_(hidden)
        torch._foreach_copy_(list(one.tensors.values()), list(tensors.values()))
        one.forward.replay()
        ctx.one, one.owner = one, weakref.ref(ctx)
        return one.result.detach()

    @staticmethod
    def backward(ctx: Any, dresult: torch.Tensor) -> Any:
        one = ctx.one
        one.dresult.copy_(dresult)
        one.backward.replay()
        one.owner = None
        parts = one.gradients.clone().split([p.numel() for p in one.parameters])
        gradients = [part.view_as(p) for part, p in zip(parts, one.parameters, strict=True)]
        if all(p.grad is None for p in one.parameters):
            for parameter, gradient in zip(one.parameters, gradients, strict=True):
                parameter.grad = gradient
        else:
            torch._foreach_add_([p.grad for p in one.parameters], gradients)
        return None, None if one.dhidden is None else one.dhidden.clone(), None, None
