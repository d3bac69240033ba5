"""A feed-forward layer that reads the weights of active neurons only.

With one contiguous row a neuron in each of w_gate, w_up and w_down_t, for each token x

    gated:  z = W_g x + b_gate,  a = act(z),  u = W_u x + b_up,  h = a·u
    plain:  z = W_u x + b_up,    h = a = act(z)
    S = {i : |a_i| > threshold_i},   y = Σ_{i ∈ S} h_i w_down_t[i] + b_down.

With s_i = ∂y · w_down_t[i] for i in S the derivatives are du = s a, dz = s u act'(z) (plain:
s act'(z)), and those of x and of the weights are products over S once more; S itself is a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.ops._sparse_ffn import Call, compose, dense, sparse_ffn_op
from torchzoo.ops.calling import below_autograd, refuse_forward_mode, values_readable
from torchzoo.ops.rows import wide

ACTIVATIONS = ("relu", "relu2", "shifted_relu", "fatrelu", "silu")
# On a CPU N tokens with a share ρ of active neurons are faster as matrix products where Nρ > 10 and
# ρ > 0.2, as measured for layers beyond the caches; on CUDA ρ is not known without waiting.
DENSE_TOKENS, DENSE_SHARE = 10.0, 0.2
SPARSE_TOKENS_CUDA = 8

_LAYOUTS = (  # attributes of known layers: up, down, gate
    ("up_proj", "down_proj", "gate_proj"),
    ("w3", "w2", "w1"),
    ("up", "down", "gate"),
    ("fc1", "fc2", None),
    ("wi", "wo", None),
    ("w_up", "w_down", "w_gate"),
    ("up_proj", "down_proj", None),
    ("up", "down", None),
)


class FFNStats(NamedTuple):
    """What a call had to do.

    Attributes:
        active: How many neurons count for each token, `(...)`.
        union: Share of the neurons that count for some token, `()`.
        dense: Whether y was computed from all rows, `()`.
    """

    active: Tensor
    union: Tensor
    dense: Tensor


def sparse_ffn(
    x: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    w_gate: Tensor | None = None,
    *,
    b_up: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "relu",
    shift: float = 0.0,
    threshold: float | Tensor = 0.0,
    threshold_on: str = "act",
    top_k: int | None = None,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
    policy: str = "sparse",
    return_stats: bool = False,
) -> Any:
    """A feed-forward layer in which only neurons whose activation passes a threshold take part.

    Sums are kept in float32 (float64 for float64). A token's result does not depend on its batch,
    bit for bit, unless `policy` allows matrix products. Under autocast, tensors other than float64
    are cast to its type. Gradients reach x, weights and biases, not the threshold; which neurons
    count is a constant of the derivative, so for relu at threshold 0 it is the dense one.

    One token is bound by the weights read: a share ρ of active neurons reads (1 + 2ρ)/3 of a gated
    layer, (1 + ρ)/2 of a plain one, ρ with a mask. N independent tokens read 1 − (1 − ρ)^N.

    Args:
        x: Tokens.
        w_up: Up-projection, one neuron a row.
        w_down_t: Down-projection, transposed: one neuron a row.
        w_gate: Gate, one neuron a row; None: the layer has no gate.
        b_up: Bias of the up-projection.
        b_gate: Bias of the gate.
        b_down: Bias of the output.
        activation: `"relu"`, `"relu2"` (its square), `"shifted_relu"` (relu(z − shift)),
            `"fatrelu"` (relu whose small values are dropped, not shifted: `threshold` says which)
            or `"silu"`.
        shift: The shift of `"shifted_relu"`.
        threshold: A neuron counts where abs(a) is strictly above this, ≥ 0, one for all or `(H,)`.
            NaN counts. At 0 exact zeros are skipped, so y is that of the dense layer.
        threshold_on: `"act"`: abs(a) is compared; `"product"`: abs(h), which takes u of every
            neuron, so that w_down_t alone is spared.
        top_k: Of the neurons that count keep the k largest a, on ties the lowest.
        mask: Which neurons may count, as from a predictor. Rows that it rules out for every token
            are not read at all.
        indices: The same as neuron numbers; −1 pads.
        policy: `"sparse"`: rows of neurons that don't count are never read; `"dense"`: matrix
            products that read all of them; `"auto"`: whichever is faster.
        return_stats: Return `FFNStats` too.

    Shape:
        - x: `(..., D)`
        - w_up, w_down_t, w_gate: `(H, D)`
        - b_up, b_gate: `(H,)`
        - b_down: `(D,)`
        - mask: `(..., H)`, leading dimensions as x
        - indices: `(..., K)`, leading dimensions as x
        - output: `(..., D)`

    Returns:
        y, or y and `FFNStats`.

    Raises:
        ValueError: Shapes, types, devices or options that don't fit together.
        NotImplementedError: An input has a forward-mode tangent.

    Source:
        Mirzadeh et al., "ReLU strikes back: exploiting activation sparsity in large language
        models", 2023 (skipped rows, shifted relu); Song et al., "ProSparse: introducing and
        enhancing intrinsic activation sparsity within large language models", 2024 (fatrelu).

    Example:
        >>> w_up = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> w_down_t = torch.tensor([[2.0, 3.0], [torch.nan, torch.nan]])
        >>> sparse_ffn(torch.tensor([1.0, 1.0]), w_up, w_down_t)
        tensor([2., 3.])
    """
    weights = {"w_up": w_up, "w_down_t": w_down_t, "w_gate": w_gate}
    biases = {"b_up": b_up, "b_gate": b_gate, "b_down": b_down}
    _check_tensors(x, weights, biases)
    _check_options(activation, shift, threshold, threshold_on, top_k, policy, w_up.shape[0])
    refuse_forward_mode("sparse_ffn", x, *weights.values(), *biases.values())
    mask = _as_mask(x, w_up.shape[0], mask, indices)
    tensors: list[Any] = [x, *weights.values(), *biases.values()]
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
    _check_types(tensors)
    x, w_up, w_down_t, w_gate, b_up, b_gate, b_down = tensors
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    thresholds = threshold if isinstance(threshold, Tensor) and threshold.ndim else None
    if isinstance(threshold, Tensor) and thresholds is None:
        thresholds = threshold.expand(w_up.shape[0])
    if thresholds is not None:
        thresholds = thresholds.detach().to(x.device, wide(tokens.dtype))
    dense_above = _dense_above(policy, tokens)
    call = Call(
        *(tokens, w_up, w_down_t, w_gate, b_up, b_gate, b_down, thresholds),
        None if mask is None else mask.flatten(0, -2),
        0.0 if isinstance(threshold, Tensor) else float(threshold),
        activation,
        float(shift),
        threshold_on == "product",
        dense_above,
    )
    if dense_above < 0:
        y, active = dense(call, top_k)
    elif top_k is not None:
        y, _, _, active = compose(call, top_k)
    else:
        with below_autograd(x, *weights.values(), *biases.values()):
            y, _, _, active = sparse_ffn_op(*call)
    y = y.view(*x.shape[:-1], w_up.shape[1])
    if not return_stats:
        return y
    share = active.sum() / max(active.numel(), 1)
    union = active.any(0).sum() / max(active.shape[1], 1)
    return y, FFNStats(active.sum(1).view(x.shape[:-1]), union, share > dense_above)


def pack_ffn(module: nn.Module) -> dict[str, Tensor | None]:
    """The weights of a feed-forward layer in the layout of `sparse_ffn`, by argument.

    The down-projection is transposed, once, into a new tensor through which gradients flow back to
    the layer; the other weights are those of the layer, whose state_dict stays as it is.

    Args:
        module: A layer whose linear layers are named gate_proj, up_proj and down_proj, or w1, w3
            and w2, or (gate,) up and down, or fc1 and fc2, or wi and wo; or an `nn.Sequential` with
            two linear layers.

    Returns:
        What to pass on: `sparse_ffn(x, **pack_ffn(module))`.

    Raises:
        ValueError: None of these names is there.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> x = torch.randn(3, 2)
        >>> torch.testing.assert_close(sparse_ffn(x, **pack_ffn(mlp)), mlp(x))
    """
    up, down, gate = _linears(module)
    return {
        "w_up": up.weight,
        "w_down_t": down.weight.mT.contiguous(),
        "w_gate": None if gate is None else gate.weight,
        "b_up": up.bias,
        "b_gate": None if gate is None else gate.bias,
        "b_down": down.bias,
    }


def _linears(module: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear | None]:
    if isinstance(module, nn.Sequential):
        linears = [layer for layer in module if isinstance(layer, nn.Linear)]
        if len(linears) == 2:
            return linears[0], linears[1], None
    for names in _LAYOUTS:
        found = [None if name is None else getattr(module, name, None) for name in names]
        wanted = [layer for layer, name in zip(found, names, strict=True) if name is not None]
        if all(isinstance(layer, nn.Linear) for layer in wanted):
            up, down, gate = found
            return up, down, gate  # type: ignore[return-value]
    known = "; ".join(", ".join(name for name in names if name) for names in _LAYOUTS)
    raise ValueError(
        f"module: expected linear layers named {known}, or an nn.Sequential with two, "
        f"got {type(module).__name__}"
    )


def _check_tensors(
    x: Tensor, weights: dict[str, Tensor | None], biases: dict[str, Tensor | None]
) -> None:
    w_up = weights["w_up"]
    assert w_up is not None
    if w_up.ndim != 2:
        raise ValueError(f"w_up: expected shape (H, D), got {tuple(w_up.shape)}")
    neurons, features = w_up.shape
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(
            f"x: expected last dimension {features}, as w_up has columns, got {tuple(x.shape)}"
        )
    shapes = dict.fromkeys(weights, (neurons, features)) | {
        "b_up": (neurons,),
        "b_gate": (neurons,),
        "b_down": (features,),
    }
    for name, tensor in {"x": x, **weights, **biases}.items():
        if tensor is None:
            continue
        if name in shapes and tensor.shape != shapes[name]:
            raise ValueError(f"{name}: expected shape {shapes[name]}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected it on {x.device}, as x is, got {tensor.device}")
    if biases["b_gate"] is not None and weights["w_gate"] is None:
        raise ValueError("b_gate: got a bias, but there is no w_gate")


def _check_types(tensors: list[Any]) -> None:
    names = ("x", "w_up", "w_down_t", "w_gate", "b_up", "b_gate", "b_down")
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.dtype != tensors[0].dtype:
            raise ValueError(
                f"{name}: expected the type of x, {tensors[0].dtype}, got {tensor.dtype}"
            )


def _check_options(
    activation: str,
    shift: float,
    threshold: float | Tensor,
    threshold_on: str,
    top_k: int | None,
    policy: str,
    neurons: int,
) -> None:
    for name, value, known in (
        ("activation", activation, ACTIVATIONS),
        ("threshold_on", threshold_on, ("act", "product")),
        ("policy", policy, ("sparse", "auto", "dense")),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if shift and activation != "shifted_relu":
        raise ValueError(f"shift: only shifted_relu has one, got {shift} for {activation}")
    if isinstance(threshold, Tensor):
        if threshold.shape not in (torch.Size([]), torch.Size([neurons])):
            raise ValueError(
                f"threshold: expected a scalar or shape ({neurons},), got {tuple(threshold.shape)}"
            )
        if threshold.is_cpu and values_readable(threshold) and not bool((threshold >= 0).all()):
            raise ValueError(f"threshold: expected numbers ≥ 0, got {threshold.min().item()}")
    elif not threshold >= 0:
        raise ValueError(f"threshold: expected a number ≥ 0, got {threshold}")
    if top_k is not None and not 1 <= top_k <= neurons:
        raise ValueError(f"top_k: expected 1 to {neurons}, the number of neurons, got {top_k}")


def _as_mask(x: Tensor, neurons: int, mask: Tensor | None, indices: Tensor | None) -> Tensor | None:
    """The mask, or the indices as one, with at least two dimensions."""
    if mask is not None and indices is not None:
        raise ValueError("mask, indices: expected one of them, got both")
    if mask is not None:
        expected = (*x.shape[:-1], neurons)
        if mask.dtype != torch.bool or mask.shape != expected or mask.device != x.device:
            raise ValueError(
                f"mask: expected bool of shape {expected} on {x.device}, "
                f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
            )
    if indices is not None:
        if indices.dtype not in (torch.int32, torch.int64) or indices.device != x.device:
            raise ValueError(
                f"indices: expected int32 or int64 on {x.device}, "
                f"got {indices.dtype} on {indices.device}"
            )
        if indices.shape[:-1] != x.shape[:-1] or indices.ndim != x.ndim:
            raise ValueError(
                f"indices: expected shape {(*x.shape[:-1], 'K')}, got {tuple(indices.shape)}"
            )
        if indices.is_cpu and values_readable(indices) and indices.numel():
            low, high = (int(value) for value in indices.aminmax())
            if low < -1 or high >= neurons:
                raise ValueError(f"indices: expected -1 to {neurons - 1}, got {low} to {high}")
        columns = torch.where(indices < 0, neurons, indices.long())
        mask = x.new_zeros((*x.shape[:-1], neurons + 1), dtype=torch.bool)
        mask = mask.scatter(-1, columns, True)[..., :neurons]
    return mask.unsqueeze(0) if mask is not None and mask.ndim == 1 else mask


def _dense_above(policy: str, tokens: Tensor) -> float:
    """Above which share of active pairs all rows may be read: 1 for never, −1 for always."""
    if policy == "dense":
        return -1.0
    if policy == "sparse":
        return 1.0
    if tokens.is_cpu:
        return max(DENSE_SHARE, DENSE_TOKENS / max(tokens.shape[0], 1))
    return 1.0 if tokens.shape[0] <= SPARSE_TOKENS_CUDA else -1.0
