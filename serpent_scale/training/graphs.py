"""The forward and backward passes of a training step as CUDA graphs: one launch each in place of thousands.

A SeRpEnt layer is many small kernels, and a layer of a shared sequence many exchanges: a host launches them more slowly than a GPU
runs them.
"""
from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel

LIMIT = 16  # graphs kept; batches of other shapes run without one


class GraphedForward:
    """Takes the place of `model.forward`: what is asked for a gradient of the loss replays a graph, the rest runs as before.

    The shapes inside depend on the documents only by their slots, so there is one graph for each number of them. The first batch
    of a kind runs without (its kernels are compiled there), the second is captured. Results are the same to the bit.
    """

    def __init__(
        self, model: LanguageModel, accumulates: bool = False, shard: Callable[[Documents], Documents] = lambda whole: whole
    ):
        """accumulates: gradients of several batches are summed, so each batch needs its own. shard: of documents of whole
        sequences, those of the piece that the model is given."""
        self.model, self.forward, self.accumulates, self.shard = model, model.forward, accumulates, shard
        self.graphs: dict[tuple, _Graph | None] = {}
        self.pool, self.gradients = torch.cuda.graph_pool_handle(), None

    def __call__(
        self, tokens: Tensor, documents: Documents | None = None, labels: Tensor | None = None, states: list | None = None,
        per_token: bool = False, last_only: bool = False,
    ) -> tuple[Tensor, list]:
        usual = labels is not None and documents is not None and documents.live is None and states is None and not per_token
        if not (usual and torch.is_grad_enabled()):
            return self.forward(tokens, documents, labels, states, per_token, last_only)
        slots, whole = self.model.slots(documents), _whole(documents)
        # Shapes of what a piece of a sequence tells others depend on where in it the documents lie.
        key = tokens.shape, slots, whole.lengths if slots and whole is not documents else ()
        if key not in self.graphs:
            if len(self.graphs) < LIMIT:
                self.graphs[key] = None
            return self.forward(tokens, documents, labels)
        graph = self.graphs[key] = self.graphs[key] or _Graph(self, tokens, documents, labels)
        graph.fill(tokens, documents, labels)
        return _Replay.apply(graph, *graph.parameters), []

    def release(self) -> None:
        """Drop all graphs: a communicator that is in one cannot be closed. Batches run without from now on."""
        for graph in filter(None, self.graphs.values()):
            graph.forward.reset()
            graph.backward.reset()
        self.graphs, self.gradients, self.model.forward = {}, None, self.forward


def _whole(documents: Documents) -> Documents:
    return documents if documents.shard is None else documents.shard.whole


class _Graph:
    """Two graphs: from a batch in fixed memory to the loss, and on to the gradients, in memory that all graphs share."""

    def __init__(self, owner: GraphedForward, tokens: Tensor, documents: Documents, labels: Tensor):
        gc.collect()  # the graphs of a model that is gone: freed during a capture they would end it
        self.owner, named = owner, dict(owner.model.named_parameters())
        self.parameters = list(named.values())
        self.tokens, self.labels, self.reset = tokens.clone(), labels.clone(), _whole(documents).reset.clone()
        self.seed = torch.ones((), device=tokens.device)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Leaves of the graph's own: those of the model may be tied to the stream that hooks on their gradients were set on.
        leaves = {f"model.{name}": p.detach().requires_grad_() for name, p in named.items()}
        bare = _Bare(owner.model, owner.forward)
        device = tokens.device.type
        # Weights cast to the autocast dtype belong to the graph: a cached cast would be of the weights at capture.
        with torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False):
            # Of this thread alone: one of the collective library's asks the device for its events meanwhile.
            with torch.cuda.graph(self.forward, owner.pool, capture_error_mode="thread_local"):
                documents = owner.shard(Documents(self.reset, _whole(documents).lengths))
                loss, _ = functional_call(bare, leaves, (self.tokens, documents, self.labels))
        with torch.cuda.graph(self.backward, owner.pool, capture_error_mode="thread_local"):
            gradients = torch.autograd.grad(loss, list(leaves.values()), self.seed)
            if owner.gradients is not None:
                torch._foreach_copy_(owner.gradients, gradients)
        if owner.gradients is None:
            owner.gradients = list(gradients)
        self.loss = loss.detach()

    def fill(self, tokens: Tensor, documents: Documents, labels: Tensor) -> None:
        self.tokens.copy_(tokens)
        self.labels.copy_(labels)
        self.reset.copy_(_whole(documents).reset)


class _Bare(nn.Module):
    """A model without the hooks that an engine put on it."""

    def __init__(self, model: nn.Module, forward):
        super().__init__()
        self.model, self.of_model = model, forward

    def forward(self, *arguments):
        return self.of_model(*arguments)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph, *parameters):
        ctx.graph = graph
        graph.forward.replay()
        return graph.loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        graph = ctx.graph
        graph.seed.copy_(grad)
        graph.backward.replay()
        gradients = graph.owner.gradients
        return None, *(g.clone() if graph.owner.accumulates else g.detach() for g in gradients)
