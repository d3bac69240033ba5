"""Experts on several ranks: the way of tokens to their experts and back, and expert parallelism.

Every rank has tokens of its own, sorted by expert. They go to ranks that hold their experts, and
the outputs come back:

    counts (D, E)  ->  holders (E, D)  ->  plan (D, E, D)  ->  rows out, experts, rows back.

Under expert parallelism an expert is held by the one rank that owns it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call

from torchzoo.hub import ZooModel
from torchzoo.moe.collectives import Group, Traffic, exchange_rows, gather_counts, group_rank
from torchzoo.moe.experts import GroupedExperts
from torchzoo.moe.placement import ExpertPlacement, check_nodes, contiguous_owner, one_owner
from torchzoo.moe.token_plan import plan_dispatch
from torchzoo.registry import Comparison, Example, register


class ShardedExperts(ZooModel):
    """Base of experts on several ranks: sends rows to the holders of their experts and back.

    Attributes:
        num_experts: Number of experts `E`, of all ranks.
        owner: `(E,)`, the rank that owns each expert.
        traffic: Bytes that this rank sent and received.
    """

    owner: Tensor

    def __init__(
        self,
        experts: nn.Module,
        mesh: DeviceMesh | None,
        average_gradients: bool,
        node_size: int | None,
    ) -> None:
        _check_experts(experts)
        if mesh is not None and mesh.ndim != 1:
            raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}; take mesh['name']")
        self.check_options(1 if mesh is None else mesh.size(), node_size)
        super().__init__()
        self.mesh = mesh
        self.rank, self.size = group_rank(self.group) if mesh is not None else (0, 1)
        self.node_size = self.size if node_size is None else node_size
        self.average_gradients = average_gradients
        self.num_experts = len(next(experts.parameters()))
        self.traffic = Traffic()
        self.owner = contiguous_owner(self.num_experts, self.size)
        # in a tuple, as its parameters, which hold no memory, are not this module's
        self._template = (copy.deepcopy(experts).to("meta"),)

    @staticmethod
    def check_options(size: int, node_size: int | None) -> None:
        """Raise a ValueError for nodes that don't divide the ranks."""
        if node_size is not None:
            check_nodes(size, node_size)

    @property
    def group(self) -> Group | None:
        """The process group; None for one process."""
        return None if self.mesh is None else self.mesh.get_group()

    @property
    def template(self) -> nn.Module:
        """The experts without their weights, which are on the meta device."""
        return self._template[0]

    def holders(self, counts: Tensor) -> ExpertPlacement:
        """Which ranks hold which experts in an iteration with these counts `(D, E)`."""
        raise NotImplementedError

    def compute(self, x: Tensor, offsets: Tensor, placement: ExpertPlacement | None) -> Tensor:
        """Apply the experts that this rank holds to rows sorted by expert."""
        raise NotImplementedError

    def apply_experts(self, weights: Mapping[str, Tensor], x: Tensor, offsets: Tensor) -> Tensor:
        """Call the experts with these weights."""
        return functional_call(self.template, dict(weights), (x, offsets))

    def shared(self, weight: Tensor) -> Tensor:
        """A weight whose gradient, a sum over all ranks' tokens, is averaged where asked for."""
        if self.average_gradients and self.size > 1 and weight.requires_grad:
            weight = weight.view_as(weight)
            weight.register_hook(lambda grad: grad / self.size)
        return weight

    def check_offsets(self, offsets: Tensor) -> None:
        """Raise a ValueError unless there is an end for each expert."""
        if offsets.shape != (self.num_experts,):
            raise ValueError(f"offsets: expected ({self.num_experts},), got {tuple(offsets.shape)}")

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Apply to each row its expert, wherever that is."""
        self.check_offsets(offsets)
        if self.size == 1:
            return self.compute(x, offsets, None)
        counts = gather_counts(offsets.long().diff(prepend=offsets.new_zeros(1).long()), self.group)
        counts = counts.cpu()
        placement = self.holders(counts)
        plan = plan_dispatch(counts, placement.materialized, self.node_size)
        send, receive = plan[self.rank].sum(0).tolist(), plan[:, :, self.rank].sum(1).tolist()

        # rows come sorted by (expert, target); they leave sorted by (target, expert)
        out = _by_second(plan[self.rank]).to(x.device)
        rows = exchange_rows(x[out], send, receive, self.group, traffic=self.traffic)
        # they arrive sorted by (source, expert)
        by_expert = _by_second(plan[:, :, self.rank]).to(x.device)
        held = placement.held(self.rank)
        ends = plan[:, held, self.rank].sum(0).cumsum(0).to(offsets)
        y = self.compute(rows[by_expert], ends, placement)
        y = exchange_rows(_unsorted(y, by_expert), receive, send, self.group, traffic=self.traffic)
        y = _unsorted(y, out)
        return torch.cat([y, y.new_zeros(len(x) - len(y), *y.shape[1:])])


def _check_experts(experts: nn.Module) -> None:
    sizes = {name: tuple(weight.shape[:1]) for name, weight in experts.named_parameters()}
    if not sizes or len(set(sizes.values())) > 1 or () in sizes.values():
        raise ValueError(f"experts: expected weights stacked by expert, got first sizes {sizes}")
    if any("." in name for name in sizes) or next(experts.buffers(), None) is not None:
        raise ValueError(
            f"experts: expected weights of its own and no buffers, got {type(experts).__name__} "
            f"with {[*sizes, *dict(experts.named_buffers())]}"
        )


def _by_second(counts: Tensor) -> Tensor:
    """Order that sorts rows, which are sorted by `(a, b)` with `counts (a, b)` of each, by b."""
    index = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
    return index.repeat_interleave(counts.flatten()).argsort(stable=True)


def _unsorted(rows: Tensor, order: Tensor) -> Tensor:
    """Undo `rows = before[order]`, where `order` is a permutation."""
    return rows[order.argsort()]


@register(
    example=lambda: Example(
        kwargs={"experts": GroupedExperts(6, 8, 3, bias=True), "mesh": None},
        inputs=(torch.randn(7, 6), torch.tensor([3, 3, 7], dtype=torch.int32)),
        batch_dims=0,
        bad_options={"node_size": 2},
    ),
    compare=lambda: Comparison(
        {"experts": GroupedExperts(256, 512, 8), "mesh": None},
        (
            torch.randn(1024, 256),
            128 * torch.arange(1, 9, dtype=torch.int32),
        ),
        {"GroupedExperts": lambda experts, **_: experts},
    ),
)
class EPExperts(ShardedExperts):
    """Expert parallelism: each rank keeps a block of experts, tokens travel to them.

    Weights are DTensors sharded by expert, so checkpoints of `torch.distributed.checkpoint` load
    at any number of ranks.

    Args:
        experts: Experts with weights stacked by expert, such as `GroupedExperts`; rank 0's are
            taken.
        mesh: Ranks, in one dimension; None for one process.
        average_gradients: Whether the gradients of the experts, which are sums over the tokens of
            all ranks, are divided by the number of ranks, as DDP and FSDP2 divide theirs.
        node_size: Ranks a node; by default all are on one.

    Shape:
        - x: `(N, dim)`, this rank's rows sorted by expert
        - offsets: `(E,)`, int32 or int64, where each expert's rows end
        - output: `(N, dim)`, zeros past the last end

    Returns:
        For each row the output of its expert.

    Raises:
        ValueError: Experts whose weights are not stacked, a mesh of more than one dimension,
            nodes that don't divide the ranks, or inputs that don't fit.
        RuntimeError: Another rank ended.

    Source:
        Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic
        Sharding", 2020.

    Example:
        >>> experts = EPExperts(GroupedExperts(8, 16, 2))
        >>> experts(torch.randn(5, 8), torch.tensor([2, 5])).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        experts: nn.Module,
        mesh: DeviceMesh | None = None,
        *,
        average_gradients: bool = False,
        node_size: int | None = None,
    ) -> None:
        super().__init__(experts, mesh, average_gradients, node_size)
        for name, weight in experts.named_parameters():
            value = weight.detach().clone()
            if mesh is not None:
                value = distribute_tensor(value, mesh, [Shard(0)])
            self.register_parameter(name, nn.Parameter(value, weight.requires_grad))

    def holders(self, counts: Tensor) -> ExpertPlacement:
        """The owners, whatever the counts are."""
        owned = one_owner(self.owner, self.size)
        return ExpertPlacement(self.owner, owned, node_size=self.node_size)

    def compute(self, x: Tensor, offsets: Tensor, placement: ExpertPlacement | None) -> Tensor:
        """Apply the experts that this rank owns."""
        weights = {
            name: self.shared(weight.to_local() if isinstance(weight, DTensor) else weight)
            for name, weight in self.named_parameters()
        }
        return self.apply_experts(weights, x, offsets)

    def extra_repr(self) -> str:
        """Sizes in short."""
        return f"num_experts={self.num_experts}, ranks={self.size}"
