"""S4: the state space layer with normal-plus-low-rank matrices from HiPPO bases.

Each feature has a system x' = A x + B u, y = C x + D u, that starts as an online projection of the
past onto an orthogonal basis; `init` chooses which, and 1/dt the length of its memory in steps:

    legs        Legendre polynomials of exp(-s), weight exp(-s): all of the past, blurring away
    legt        Legendre polynomials on a sliding window
    fout        a Fourier basis on a sliding window
    lagt        Laguerre functions
    legs+fout   half of the features each

Gu, Johnson, Timalsina, Rudra and Re, "How to train your HiPPO: state space models with generalized
orthogonal basis projections", 2022. Deviations: those of `torchzoo.ssm.dplr`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from torchzoo import peers
from torchzoo.registry import Comparison, Example, register
from torchzoo.ssm.dplr import DPLRKernel
from torchzoo.ssm.layer import SSMLayer


@register(
    paper=62,
    example=lambda: Example(
        {"d_model": 3, "d_state": 4},
        (torch.randn(2, 5, 3),),
        bad_options={
            "d_model": 0,
            "d_state": 3,
            "init": "lmu",
            "disc": "zoh",
            "rank": 0,
            "dropout": 1.0,
            "activation": "swish",
            "post": "mlp",
            "dt_min": 1.0,
            "channels": 0,
            "lr": -1.0,
        },
    ),
    compare=lambda: Comparison(
        {"d_model": 256, "d_state": 64}, (torch.randn(4, 1024, 256),), peers.SEQUENCES
    ),
)
class S4(SSMLayer):
    """State space layer with HiPPO matrices: a long convolution a feature, then a gated linear map.

    Over whole sequences it costs O(L log L) and is parallel; `step` runs the same system as a
    recurrence with a state of fixed size. Both take the state that the other left.

    Args:
        d_model: Features D.
        d_state: State size N of each feature, even.
        init: `"legs"`, `"legt"`, `"fout"` or `"lagt"`, or several joined by `+`, such as
            `"legs+fout"`, which share the features out.
        disc: `"bilinear"`, the only rule that keeps the structure of the matrices.
        rank: Rank of the low-rank part; None for what `init` needs, 2 for `"legt"` and 1 else.
        bidirectional: Convolve with a second kernel from the future too.
        dropout: Probability of dropping a feature of a sequence, at all steps together.
        activation: `"gelu"`, `"relu"`, `"silu"`, `"tanh"` or None.
        post: `"glu"` maps the features to 2D and gates one half with the other; `"linear"` maps
            them to D; None leaves them, C D in number.
        kernel: More options of `DPLRKernel`: `dt_min`, `dt_max`, `channels`, `train_B` and `lr`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - x: `(..., L, D)`
        - output: `(..., L, D)`, or `(..., L, C D)` without `post`
        - state: `(..., D, N/2)`, complex
        - lengths: `(...)`

    Returns:
        The outputs; with `return_state=True` a pair of them and the state.

    Raises:
        ValueError: An option out of its range, tensors of other shapes, or a state asked of a
            bidirectional layer.

    Source:
        Gu, Johnson, Timalsina, Rudra and Re, "How to train your HiPPO: state space models with
        generalized orthogonal basis projections", 2022.

    Example:
        >>> layer = S4(8, d_state=16, init="legs+fout").eval()
        >>> y, state = layer(torch.randn(2, 100, 8), return_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 100, 8]), torch.Size([2, 8, 8]))
        >>> layer.setup_step()
        >>> next_y, state = layer.step(torch.randn(2, 8), state)
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str = "legs",
        disc: Literal["bilinear"] = "bilinear",
        rank: int | None = None,
        bidirectional: bool = False,
        dropout: float = 0.0,
        activation: Literal["gelu", "relu", "silu", "tanh"] | None = "gelu",
        post: Literal["glu", "linear"] | None = "glu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kernel: Any,
    ):
        channels = kernel.pop("channels", 1) * (2 if bidirectional else 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"init": init, "disc": disc, "rank": rank, "channels": channels}
        super().__init__(
            DPLRKernel(d_model, d_state, **options, **kernel, **factory),
            bidirectional=bidirectional,
            dropout=dropout,
            activation=activation,
            post=post,
            **factory,
        )
