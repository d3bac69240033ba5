"""Fully sharded sparse data parallelism for experts, and `parallelize_moe`.

An expert's parameters, gradient and optimizer state live on one rank, its owner. In each iteration
the experts with the highest loads of the last iterations are copied to other ranks by a sparse
all-gather, freed after use, gathered again in backward, and their gradients are added up at the
owner by the adjoint, a sparse reduce-scatter. Whatever is copied where, the result is that of one
process which has all tokens and experts. With `prefetch` all three go on beside computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchzoo.moe.collectives import sparse_all_gather
from torchzoo.moe.expert_parallel import EPExperts, ShardedExperts
from torchzoo.moe.experts import GroupedExperts
from torchzoo.moe.layer import MoELayer
from torchzoo.moe.placement import ExpertPlacement, one_owner
from torchzoo.moe.planning import sparse_materialize
from torchzoo.moe.prefetch import Copies, freed
from torchzoo.moe.resharding import reshard
from torchzoo.moe.routing import check_count
from torchzoo.moe.simulate import calibrate as calibrated
from torchzoo.registry import Comparison, Example, register


@register(
    paper=56,
    example=lambda: Example(
        kwargs={"experts": GroupedExperts(6, 8, 3, bias=True), "mesh": None, "window": 5},
        inputs=(torch.randn(7, 6), torch.tensor([3, 3, 7], dtype=torch.int32)),
        batch_dims=0,
        bad_options={"window": 0, "memory_capacity": -1, "overlap_degree": -1},
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
class FSSDPExperts(ShardedExperts):
    """Experts under fully sharded sparse data parallelism.

    A parameter is one expert's, called `<name>.<expert>`, and only on the rank that owns it; so
    `state_dict`, optimizer states and checkpoints of `torch.distributed.checkpoint` go by global
    expert ids and load at any number of ranks, from unsharded experts too. Copies of experts are
    chosen from the loads of past iterations, an iteration being a forward with its backward.

    Args:
        experts: Experts with weights stacked by expert, such as `GroupedExperts`; rank 0's are
            taken.
        mesh: Ranks, in one dimension; None for one process.
        overlap_degree: How many experts can be sent while other layers compute, at most.
        memory_capacity: How many copies a rank can hold besides the experts it owns.
        window: Over how many past iterations the load of an expert is averaged.
        reshard_every: After how many calls of `step` owners are chosen anew; None for never.
        rematerialize: Whether copies are freed after forward and gathered again for backward.
            Under activation checkpointing set it to False, as that does the same already.
        prefetch: Whether copies are under way before they are needed, and gradients while others
            are computed, see `prefetch_in_order`; not together with `calibrate`, nor where
            activation checkpointing runs forward again.
        calibrate: Whether more copies may be made once an iteration's loads are known, if
            `simulate_step` predicts that this pays off; a mapping replaces some of its constants.
        average_gradients: Whether the gradients of the experts, which are sums over the tokens of
            all ranks, are divided by the number of ranks, as DDP and FSDP2 divide theirs.
        node_size: Ranks a node; by default all are on one.

    Shape:
        - x: `(N, dim)`, this rank's rows sorted by expert
        - offsets: `(E,)`, int32 or int64, where each expert's rows end
        - output: `(N, dim)`, zeros past the last end

    Attributes:
        load_history: `(window, E)` int64 buffer, tokens of all ranks, the latest iteration last.
        traffic: Bytes that this rank sent and received.

    Returns:
        For each row the output of its expert.

    Raises:
        ValueError: Experts whose weights are not stacked, a mesh of more than one dimension,
            options out of range, or inputs that don't fit.
        RuntimeError: Another rank ended.

    Source:
        Qing et al., "Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse
        Data Parallelism", 2025, sections 3 and 4.

    Example:
        >>> experts = FSSDPExperts(GroupedExperts(8, 16, 2))
        >>> experts(torch.randn(5, 8), torch.tensor([2, 5])).shape
        torch.Size([5, 8])
        >>> sorted(experts.state_dict())
        ['load_history', 'steps', 'w_in.0', 'w_in.1', 'w_out.0', 'w_out.1']
    """

    load_history: Tensor
    steps: Tensor

    def __init__(
        self,
        experts: nn.Module,
        mesh: DeviceMesh | None = None,
        *,
        overlap_degree: int = 2,
        memory_capacity: int = 2,
        window: int = 5,
        reshard_every: int | None = None,
        rematerialize: bool = True,
        prefetch: bool = False,
        calibrate: bool | Mapping[str, float] = False,
        average_gradients: bool = False,
        node_size: int | None = None,
    ) -> None:
        check_count("overlap_degree", overlap_degree, 0)
        check_count("memory_capacity", memory_capacity, 0)
        check_count("window", window)
        if reshard_every is not None:
            check_count("reshard_every", reshard_every)
        if prefetch and calibrate is not False:
            raise ValueError(
                f"prefetch: expected False with calibrate={calibrate!r}, whose copies are chosen "
                "by this iteration's loads, got True"
            )
        super().__init__(experts, mesh, average_gradients, node_size)
        self.overlap_degree = overlap_degree
        self.memory_capacity = memory_capacity
        self.reshard_every = reshard_every
        self.rematerialize = rematerialize
        self.prefetch = prefetch
        self.calibrate = calibrate
        # in a tuple, as neighbours are no submodules
        self._following: tuple[FSSDPExperts, ...] = ()
        self._ahead: Copies | None = None
        self.names = [name for name, _ in experts.named_parameters()]
        device = next(experts.parameters()).device
        history = torch.zeros(window, self.num_experts, dtype=torch.int64, device=device)
        self.register_buffer("load_history", history)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        for name, weight in experts.named_parameters():
            value = weight.detach().clone()
            if self.size > 1 and not value.is_meta:
                dist.broadcast(value, group=self.group, group_src=0)
            self.add_module(name, nn.ParameterDict())
            self.set_rows(name, {e: value[e].clone() for e in self.owned()}, weight.requires_grad)

    def owned(self) -> list[int]:
        """The experts that this rank owns."""
        return (self.owner == self.rank).nonzero().flatten().tolist()

    def weights_of(self, name: str) -> nn.ParameterDict:
        """The parameters of a name, by expert id as text."""
        group = getattr(self, name)
        assert isinstance(group, nn.ParameterDict)
        return group

    def set_rows(self, name: str, rows: Mapping[int, Tensor], requires_grad: bool = True) -> None:
        """Replace the parameters of a name by these experts', in order."""
        group = self.weights_of(name)
        group.clear()
        for expert in sorted(rows):
            row = rows[expert]
            same = isinstance(row, nn.Parameter)
            group[str(expert)] = row if same else nn.Parameter(row, requires_grad)

    def stacked(self, name: str) -> Tensor:
        """`(n_own, ...)`, the parameters of a name."""
        rows = list(self.weights_of(name).values())
        if rows:
            return torch.stack(rows)
        like = self.template.get_parameter(name)
        empty = torch.empty(0, *like.shape[1:], dtype=like.dtype, device=self.load_history.device)
        return empty.requires_grad_(like.requires_grad)  # its backward takes part in collectives

    def planned(self) -> ExpertPlacement:
        """Owners, and copies of the experts with the highest loads in past iterations."""
        load = self.load_history.sum(0).cpu()
        held = one_owner(self.owner, self.size)
        if bool(load.any()):
            held = sparse_materialize(
                self.owner,
                load,
                node_size=self.node_size,
                num_devices=self.size,
                **self._capacities,
            )
        return ExpertPlacement(self.owner, held, node_size=self.node_size)

    @property
    def _capacities(self) -> dict[str, Any]:
        return {
            "overlap_degree": self.overlap_degree,
            "memory_capacity": self.memory_capacity,
        }

    def holders(self, counts: Tensor) -> ExpertPlacement:
        """The placement of this iteration, which was chosen before where copies are prefetched."""
        self._counts = counts.sum(0)
        if self._ahead is not None:
            return self._ahead.placement
        placement = self.planned()
        if self.calibrate is not False:
            constants = {} if self.calibrate is True else self.calibrate
            placement = calibrated(counts, placement, constants=constants, **self._capacities)
        return placement

    def remember(self, load: Tensor) -> None:
        """Enter an iteration's loads `(E,)` into the history."""
        latest = load.to(self.load_history)[None]
        self.load_history.copy_(torch.cat([self.load_history[1:], latest]))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Apply to each row its expert, wherever that is."""
        self.check_offsets(offsets)
        if not self.prefetch or self.size == 1:
            return super().forward(x, offsets)
        if self._ahead is None or self._ahead.preceding is None:  # the latter is left from an error
            self._begin(None)
        copies = self._ahead
        assert copies is not None
        for layer in self._following:
            layer._begin(copies)
        y = super().forward(x, offsets)
        if y.requires_grad:
            y.register_hook(lambda grad: copies.enter_backward())
        return y

    def _begin(self, preceding: Copies | None) -> None:
        """Start to gather the copies of the next forward."""
        if self._ahead is not None:
            self._ahead.drop()
        self._ahead = Copies(self, preceding)

    def compute(self, x: Tensor, offsets: Tensor, placement: ExpertPlacement | None) -> Tensor:
        """Apply the experts that this rank holds, copying them here first."""
        if placement is None:
            return self.apply_experts({n: self.stacked(n) for n in self.names}, x, offsets)
        copies, self._ahead = self._ahead, None
        if copies is None:
            local = {name: self.shared(self.stacked(name)) for name in self.names}
            weights = {name: self._gather(row, placement) for name, row in local.items()}
        else:
            local, weights = copies.local, copies.take()
        self._remember_after_backward(local.values())
        for layer in self._following if copies else ():
            assert layer._ahead is not None
            layer._ahead.advance()
        if not self.rematerialize:
            return self.apply_experts(weights, x, offsets)

        def again(name: str) -> Tensor:
            if copies is not None and name in copies.again:
                return copies.again.pop(name).wait()
            with torch.no_grad():
                return self._gather(self.stacked(name), placement)

        with freed(weights, again, {} if copies is None else copies.needed):
            return self.apply_experts(weights, x, offsets)

    def _gather(self, local: Tensor, placement: ExpertPlacement) -> Tensor:
        return sparse_all_gather(local, placement, self.group, traffic=self.traffic)

    def _remember_after_backward(self, local: Iterable[Tensor]) -> None:
        """Enter the loads once the gradients are here, when nothing of backward is to be planned.

        Before, a checkpointed block that runs this forward again in backward would plan otherwise.
        """
        load = self._counts
        for weight in local:
            if weight.requires_grad:
                weight.register_hook(lambda grad: self.remember(load))
                return

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor]:
        """The state of the unsharded experts, on every rank; a collective."""
        everywhere = torch.ones(self.num_experts, self.size, dtype=torch.bool, device="cpu")
        placement = ExpertPlacement(self.owner, everywhere, node_size=self.node_size)
        return {
            name: sparse_all_gather(self.stacked(name), placement, self.group)
            for name in self.names
        }

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count an update; choose owners anew where `reshard_every` says so. A collective.

        Args:
            optimizer: The optimizer of the experts, after its step.

        Raises:
            ValueError: See `reshard`.
        """
        self.steps += 1
        if self.reshard_every and int(self.steps) % self.reshard_every == 0:
            reshard([self], optimizer)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take what is this rank's from a state of unsharded experts, or of other ranks too."""
        own = {str(expert) for expert in self.owned()}
        for name in self.names:
            stacked = state_dict.pop(f"{prefix}{name}", None)
            if stacked is not None:
                rows = {f"{prefix}{name}.{e}": row for e, row in enumerate(stacked)}
                state_dict.update(rows)
            for expert in map(str, range(self.num_experts)):
                if expert not in own:
                    state_dict.pop(f"{prefix}{name}.{expert}", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        return (
            f"num_experts={self.num_experts}, ranks={self.size}, "
            f"overlap_degree={self.overlap_degree}, memory_capacity={self.memory_capacity}"
        )


def prefetch_in_order(layers: Sequence[FSSDPExperts]) -> None:
    """Let each layer gather the copies of the next one, in the order in which forward calls them.

    The next layer's copies are under way while a layer and what follows it computes. In backward
    those of the layer before are gathered again meanwhile, and the gradients of the layer after
    are added up at their owners. So copies of two layers live at once. Results are the same, bit
    for bit, as without.

    Args:
        layers: Layers made with `prefetch=True`.

    Raises:
        ValueError: A layer without `prefetch`, or one that comes twice.

    Source:
        Qing et al., "Hecate", 2025, section 3.
    """
    if wrong := [index for index, layer in enumerate(layers) if not layer.prefetch]:
        raise ValueError(f"layers: expected prefetch=True of all, got False of {wrong}")
    if len({id(layer) for layer in layers}) < len(layers):
        raise ValueError("layers: expected each layer once, got one more often")
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        layer._following = () if following is None else (following,)


def parallelize_moe(
    layer: MoELayer,
    mesh: DeviceMesh,
    *,
    dim: str = "ep",
    mode: str = "ep",
    **options: Any,
) -> MoELayer:
    """Spread the experts of a layer over ranks, each of which has tokens of its own; in place.

    The gate and the rest stay as they are on every rank: wrap the model in
    `torch.distributed.fsdp.fully_shard` with the experts' parameters among `ignored_params`, or
    average their gradients otherwise. A capacity counts the tokens of a rank.

    Args:
        layer: The layer.
        mesh: The ranks.
        dim: The dimension of the mesh to spread the experts over.
        mode: "ep" for expert parallelism (`EPExperts`), "fssdp" for fully sharded sparse data
            parallelism (`FSSDPExperts`).
        **options: Options of that class.

    Returns:
        The layer.

    Raises:
        ValueError: An unknown mode or dimension, or options that the class refuses.

    Source:
        Qing et al., "Hecate", 2025.
    """
    if mode not in ("ep", "fssdp"):
        raise ValueError(f"mode: expected 'ep' or 'fssdp', got {mode!r}")
    names = mesh.mesh_dim_names or ()
    if dim not in names:
        raise ValueError(f"dim: expected one of {names}, the mesh's dimensions, got {dim!r}")
    if not isinstance(layer, MoELayer):
        raise ValueError(f"layer: expected a MoELayer, got {type(layer).__name__}")
    kind = EPExperts if mode == "ep" else FSSDPExperts
    layer.experts = kind(layer.experts, mesh[dim], **options)
    return layer
