"""A model of sequences from state space blocks, for whole sequences and for streams."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register
from torchzoo.ssm.block import S4Block

POOLS = ("mean", "last", None)


class SequenceState(NamedTuple):
    """What a stream needs of its past, whatever its length.

    Attributes:
        blocks: The state of each block.
        total: Sum of the features so far, `(..., d_model)`.
        steps: Steps so far, a scalar.
    """

    blocks: tuple[Tensor, ...]
    total: Tensor
    steps: Tensor


@register(
    paper=107,
    example=lambda: Example(
        {"d_input": 3, "d_output": 5, "d_model": 4, "depth": 2, "d_state": 6},
        (torch.randn(2, 7, 3),),
        bad_options={
            "d_input": 0,
            "d_output": 0,
            "d_model": 0,
            "depth": 0,
            "d_state": 5,
            "pool": "max",
            "ssm": "LSTM",
            "dropout": 1.0,
        },
    ),
    compare=lambda: Comparison(
        {"d_input": 16, "d_output": 10, "d_model": 128, "depth": 4},
        (torch.randn(4, 1024, 16),),
        peers.SEQUENCE_MODELS,
    ),
)
class SequenceModel(ZooModel):
    """Blocks of state space layers between a linear encoder and a linear head.

    Args:
        d_input: Features of a step; with `tokens` the number of different tokens.
        d_output: Outputs, for example classes.
        d_model: Features of the blocks.
        depth: Number of blocks.
        d_state: State size of each feature, even.
        tokens: The input is token numbers, which are embedded.
        pool: `"mean"`: one output a sequence, from the mean of the features over time; `"last"`:
            from those of the last step; None: an output each step.
        ssm: Name of the layer's class, such as `"S4D"`.
        dropout: Probability of dropping a feature of a sequence, at all steps together.
        options: Further options of the layer, such as `init` or `dt_min`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - x: `(..., L, d_input)`, or `(..., L)` integers with `tokens`
        - lengths: `(...)`, steps of each sequence that count
        - output: `(..., d_output)`, or `(..., L, d_output)` without `pool`

    Returns:
        The head's outputs, for example logits.

    Raises:
        ValueError: An option out of its range, or tensors of other shapes.

    Source:
        Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state
        space models", 2022, the architecture of the experiments.

    Example:
        >>> model = SequenceModel(1, 10, d_model=8, d_state=8).eval()
        >>> x = torch.randn(2, 30, 1)
        >>> state = model.initial_state(2)
        >>> for t in range(30):  # in constant memory
        ...     logits, state = model.step(x[:, t], state)
        >>> torch.allclose(logits, model(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        d_input: int,
        d_output: int,
        *,
        d_model: int = 64,
        depth: int = 2,
        d_state: int = 64,
        tokens: bool = False,
        pool: Literal["mean", "last"] | None = "mean",
        ssm: str = "S4D",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        for name, size in {"d_input": d_input, "d_output": d_output, "depth": depth}.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if pool not in POOLS:
            raise ValueError(f"pool: expected one of {POOLS}, got {pool!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options |= {"ssm": ssm, "dropout": dropout, **factory}
        self.blocks: Any = nn.ModuleList(S4Block(d_model, d_state, **options) for _ in range(depth))
        self.encoder: nn.Embedding | nn.Linear = (
            nn.Embedding(d_input, d_model, **factory)
            if tokens
            else nn.Linear(d_input, d_model, **factory)
        )
        self.norm = nn.LayerNorm(d_model, **factory)
        self.head = nn.Linear(d_model, d_output, **factory)
        self.d_input = d_input
        self.tokens = tokens
        self.pool = pool

    def reset_parameters(self) -> None:
        """Draw all parts anew, each as it starts by itself."""
        for part in (self.encoder, *self.blocks, self.norm, self.head):
            part.reset_parameters()

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        self._check(x, 1)
        h = self.encoder(x)
        if lengths is not None and lengths.shape != h.shape[:-2]:
            raise ValueError(
                f"lengths: expected shape {tuple(h.shape[:-2])}, got {tuple(lengths.shape)}"
            )
        for block in self.blocks:
            h = block(h, lengths=lengths)
        h = self.norm(h)
        if self.pool is None:
            return self.head(h)
        if lengths is None:
            return self.head(h.mean(-2) if self.pool == "mean" else h[..., -1, :])
        place = torch.arange(h.shape[-2], device=h.device)
        last = lengths[..., None] - 1
        if self.pool == "mean":
            weight = (place <= last).to(h.dtype) / (last + 1)
        else:
            weight = (place == last).to(h.dtype)
        return self.head((weight[..., None] * h).sum(-2))

    def setup_step(self, rate: float = 1.0) -> None:
        """Prepare for many calls of `step` with the present parameters."""
        for block in self.blocks:
            block.setup_step(rate)

    def initial_state(self, *batch: int) -> SequenceState:
        """The state before the first step of streams of these batch dimensions."""
        scale = self.norm.weight
        return SequenceState(
            tuple(block.initial_state(*batch) for block in self.blocks),
            scale.new_zeros(*batch, len(scale)),
            torch.zeros((), dtype=torch.int64, device=scale.device),
        )

    def step(self, x: Tensor, state: SequenceState) -> tuple[Tensor, SequenceState]:
        """Take one step of a stream.

        Args:
            x: `(..., d_input)`, or `(...)` integers with `tokens`.
            state: From `initial_state` or the step before.

        Returns:
            The outputs `(..., d_output)` for the stream up to here, and the next state.
        """
        self._check(x, 0)
        h, states = self.encoder(x), []
        for block, own in zip(self.blocks, state.blocks, strict=True):
            h, own = block.step(h, own)
            states.append(own)
        h = self.norm(h)
        after = SequenceState(tuple(states), state.total + h, state.steps + 1)
        return self.head(after.total / after.steps if self.pool == "mean" else h), after

    def _check(self, x: Tensor, times: int) -> None:
        if self.tokens:
            if x.is_floating_point() or x.ndim < times:
                raise ValueError(f"x: expected integers (..., L), got {x.dtype} {tuple(x.shape)}")
        elif x.ndim < times + 1 or x.shape[-1] != self.d_input:
            raise ValueError(f"x: expected (..., L, {self.d_input}), got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, pool={self.pool!r}"
