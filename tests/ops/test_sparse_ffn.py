"""The sparse FFN against the dense formula in float64, and what torch asks of an operator."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from torchzoo.ops.rows import rows_dot, rows_outer, rows_sum
from torchzoo.ops.sparse_ffn import ACTIVATIONS, FFNStats, pack_ffn, sparse_ffn

DOUBLE = torch.float64
OP = torch.ops.torchzoo.sparse_ffn.default
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def problem(batch=(3,), features=5, neurons=7, gated=True, biased=True, dtype=DOUBLE, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)

    found = {
        "x": draw(*batch, features),
        "w_up": draw(neurons, features),
        "w_down_t": draw(neurons, features),
        "w_gate": draw(neurons, features) if gated else None,
    }
    if biased:
        found |= {"b_up": draw(neurons), "b_down": draw(features)}
        found["b_gate"] = draw(neurons) if gated else None
    return found


def activated(name, z, shift=0.0):
    if name == "silu":
        return z / (1 + torch.exp(-z))
    positive = (z - shift).clamp(min=0)
    return positive**2 if name == "relu2" else positive


def by_formula(
    x,
    w_up,
    w_down_t,
    w_gate=None,
    b_up=0.0,
    b_gate=0.0,
    b_down=0.0,
    activation="relu",
    shift=0.0,
    threshold=0.0,
    threshold_on="act",
    top_k=None,
    mask=None,
    kept=None,
):
    """The dense masked formula in float64: y and which neurons count (or `kept`, if given)."""
    tensors = (x, w_up, w_down_t, w_gate, b_up, b_gate, b_down)
    x, w_up, w_down_t, w_gate, b_up, b_gate, b_down = (
        t.double() if isinstance(t, torch.Tensor) else t for t in tensors
    )
    up = torch.einsum("...d,hd->...h", x, w_up) + (0.0 if b_up is None else b_up)
    if w_gate is None:
        a = h = activated(activation, up, shift)
    else:
        z = torch.einsum("...d,hd->...h", x, w_gate) + (0.0 if b_gate is None else b_gate)
        a = activated(activation, z, shift)
        h = a * up
    if kept is None:
        kept = (h if threshold_on == "product" else a).abs() > threshold
        kept = kept if mask is None else kept & mask
        if top_k is not None:  # the rank of i: how many candidates are larger, or equal and before
            score = torch.where(kept, a, -torch.inf)
            larger = score.unsqueeze(-2) > score.unsqueeze(-1)
            equal = (score.unsqueeze(-2) == score.unsqueeze(-1)).tril(-1)
            kept = kept & ((larger | equal).sum(-1) < top_k)
    y = torch.einsum("...h,hd->...d", torch.where(kept, h, 0.0), w_down_t)
    return y + (0.0 if b_down is None else b_down), kept


TOLERANCE = {DOUBLE: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.claim(
    122,
    "The sparse layer equals the dense masked formula, whatever the activation, threshold, mask, "
    "top-k and policy",
    tolerance=5e-11,
)
@settings(max_examples=150, deadline=None)
@given(
    batch=st.sampled_from([(), (1,), (30,), (0,), (2, 3), (2, 0)]),
    features=st.integers(0, 40),
    neurons=st.integers(0, 20),
    gated=st.booleans(),
    biased=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    threshold=st.sampled_from([0.0, 0.3, "each"]),
    threshold_on=st.sampled_from(["act", "product"]),
    top_k=st.sampled_from([None, 1, 3]),
    masked=st.sampled_from([None, "mask", "indices"]),
    policy=st.sampled_from(["sparse", "auto", "dense"]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    seed=st.integers(0, 99),
)
def test_equals_the_formula(
    batch, features, neurons, gated, biased, activation, threshold, threshold_on, top_k, masked,
    policy, layout, seed,
):  # fmt: skip
    tensors = problem(batch, features, neurons, gated, biased, seed=seed)
    if layout == "transposed":
        change = {
            k: t.mT.contiguous().mT for k, t in tensors.items() if k[0] == "w" and t is not None
        }
    else:
        change = (
            {"x": tensors["x"].repeat_interleave(2, -1)[..., ::2]} if layout == "strided" else {}
        )
    options = {"activation": activation, "threshold_on": threshold_on}
    options["shift"] = 0.3 if activation == "shifted_relu" else 0.0
    options["threshold"] = (
        torch.linspace(0, 1, neurons).double() if threshold == "each" else threshold
    )
    options["top_k"] = None if top_k is None or top_k > neurons else top_k
    mask = torch.rand(*batch, neurons, generator=torch.Generator().manual_seed(seed)) < 0.7
    chosen = {}
    if masked == "mask":
        chosen["mask"] = mask
    elif masked == "indices":
        numbers = torch.arange(neurons).expand(*batch, neurons)
        chosen["indices"] = torch.where(mask, numbers, -1).flip(-1)
    y, stats = sparse_ffn(
        **(tensors | change), **options, **chosen, policy=policy, return_stats=True
    )
    expected, kept = by_formula(**tensors, **options, mask=mask if masked else None)
    assert y.shape == tensors["x"].shape
    torch.testing.assert_close(y, expected, atol=TOLERANCE[DOUBLE] * 50, rtol=1e-12)
    assert torch.equal(stats.active, kept.sum(-1))
    if neurons:
        assert stats.union == kept.reshape(-1, neurons).any(0).sum() / neurons


@pytest.mark.claim(
    122,
    "With relu and threshold 0 the sparse layer is the dense one, derivatives included",
    tolerance=1e-12,
)
@pytest.mark.parametrize("gated", [True, False])
def test_relu_at_zero_is_dense(gated):
    tensors = {
        k: None if t is None else t.requires_grad_() for k, t in problem((6,), 9, 40, gated).items()
    }
    leaves = [t for t in tensors.values() if t is not None]
    up = F.linear(tensors["x"], tensors["w_up"], tensors["b_up"])
    h = F.relu(F.linear(tensors["x"], tensors["w_gate"], tensors["b_gate"]) if gated else up)
    dense = F.linear(h * up if gated else h, tensors["w_down_t"].mT, tensors["b_down"])
    grad = torch.randn(6, 9, dtype=DOUBLE)
    torch.testing.assert_close(sparse_ffn(**tensors), dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        torch.autograd.grad(sparse_ffn(**tensors), leaves, grad),
        torch.autograd.grad(dense, leaves, grad),
        atol=1e-12,
        rtol=0,
    )


def native():
    """Whether the compiled operator is loaded; both it and the reference are held to the tests."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("torchzoo::sparse_ffn", "CPU")


@pytest.mark.claim(
    122,
    "Rows of neurons that don't count are not read: filled with NaN they leave the result and its "
    "derivatives equal",
    tolerance=0.0,
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["gated", "plain", "mask", "top_k", "product"])
def test_rows_that_do_not_count_are_not_read(device, dtype, case):
    tensors = problem((3,), 33, 64, case != "plain", dtype=dtype)
    tensors = {k: None if t is None else t.to(device) for k, t in tensors.items()}
    options = {"threshold": 0.5}
    if case == "mask":
        options["mask"] = (torch.rand(1, 64) < 0.3).to(device)
    elif case == "top_k":
        options["top_k"] = 5
    elif case == "product":
        options["threshold_on"] = "product"

    def run(tensors):
        leaves = {k: t.detach().requires_grad_() for k, t in tensors.items() if t is not None}
        y = sparse_ffn(**leaves, **options)
        return [y, *torch.autograd.grad(y.sum(), list(leaves.values()))]

    for n in range(1 if case == "mask" else 3):
        alone = tensors | {"x": tensors["x"][n : n + 1]}
        expected = run(alone)
        _, kept = by_formula(**alone, **options)
        assert 0 < kept.sum() < 64
        spoiled = dict(alone)
        for name in ["w_down_t", *(["w_up"] if case in ("gated", "mask", "top_k") else [])]:
            spoiled[name] = torch.where(kept[0, :, None], alone[name], torch.nan)
        if case == "mask":
            unread = ~options["mask"][0, :, None]
            spoiled["w_gate"] = torch.where(unread, torch.nan, alone["w_gate"])
        found = run(spoiled)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        if case != "mask":
            # in a batch a row that another token reads must not reach this one either
            batch = sparse_ffn(**(spoiled | {"x": tensors["x"]}), **options)
            torch.testing.assert_close(batch[n], expected[0][0], atol=1e-4, rtol=TOLERANCE[dtype])


def test_a_token_does_not_depend_on_its_batch():
    if not native():
        pytest.skip("the reference takes matrix products, which may be cut by their size")
    for dtype in (torch.float32, torch.bfloat16, DOUBLE):
        tensors = problem((9,), 1100, 70, dtype=dtype)
        batch = sparse_ffn(**tensors)
        for n in range(9):
            alone = sparse_ffn(**(tensors | {"x": tensors["x"][n]}))
            assert torch.equal(alone, batch[n])


@pytest.mark.claim(
    149, "Top-k keeps the k largest activations of those that count, the lowest on ties"
)
@pytest.mark.parametrize("policy", ["sparse", "dense"])
def test_top_k_ties(policy):
    w_up = torch.tensor([[1.0], [2.0], [2.0], [2.0], [0.0], [3.0]])
    w_down_t = torch.eye(6)[:, :1] * 0
    w_down_t = torch.tensor([[1.0], [10.0], [100.0], [1e3], [1e4], [1e5]])
    x = torch.tensor([1.0])
    expected = {1: 3e5, 2: 300020.0, 3: 300220.0, 4: 302220.0, 5: 302221.0, 6: 302221.0}
    for k, value in expected.items():
        assert sparse_ffn(x, w_up, w_down_t, top_k=k, policy=policy).item() == value


def test_values():
    """By hand: fatrelu drops without a shift, shifted relu shifts, strictly above, NaN is seen."""
    x, one = torch.ones(1), torch.ones(1, 1)

    def act(z, **options):
        return sparse_ffn(x, torch.full((1, 1), z), one, **options).item()

    assert act(0.5, activation="fatrelu", threshold=0.5) == 0
    assert act(0.75, activation="fatrelu", threshold=0.5) == 0.75
    assert act(0.75, activation="shifted_relu", shift=0.5) == 0.25
    assert act(-0.25, activation="shifted_relu", shift=-0.5) == 0.25
    assert act(3.0, activation="relu2") == 9
    assert act(3.0, activation="relu2", threshold=9.0) == 0
    assert act(float("inf"), activation="relu") == float("inf")
    assert act(2.0, threshold=torch.tensor([torch.inf])) == 0
    for activation in ACTIVATIONS:
        y = act(float("nan"), activation=activation, threshold=0.1)
        assert y != y


@pytest.mark.claim(122, "Derivatives pass gradcheck, twice", tolerance=1e-6)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "silu", "threshold": 0.05},
        {"activation": "silu", "threshold": 0.05, "threshold_on": "product"},
        {"activation": "relu", "threshold": 0.3},
        {"activation": "relu2", "mask": torch.arange(10).view(2, 5) % 3 > 0},
        {"activation": "shifted_relu", "shift": 0.2, "top_k": 2},
        {"activation": "silu", "threshold": 0.05, "policy": "auto"},
        {"activation": "silu", "threshold": 0.05, "policy": "dense"},
    ],
    ids=str,
)
def test_gradcheck(gated, options):
    tensors = {k: t for k, t in problem((2,), 3, 5, gated, seed=3).items() if t is not None}
    leaves = [t.requires_grad_() for t in tensors.values()]

    def run(*leaves):
        return sparse_ffn(**dict(zip(tensors, leaves, strict=True)), **options)

    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)


@pytest.mark.claim(
    145,
    "The derivative is that of the dense formula with the set of neurons held constant",
    tolerance=1e-10,
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("threshold_on", ["act", "product"])
def test_derivative_of_the_formula(device, gated, activation, threshold_on):
    tensors = problem((4, 10), 33, 50, gated)
    options = {"activation": activation, "threshold": 0.4, "threshold_on": threshold_on}
    options["shift"] = 0.3 if activation == "shifted_relu" else 0.0
    leaves = {k: t.to(device).requires_grad_() for k, t in tensors.items() if t is not None}
    grad = torch.randn(4, 10, 33, dtype=DOUBLE).to(device)
    _, kept = by_formula(**leaves, **options)
    expected = by_formula(**leaves, **options, kept=kept)[0]
    for policy in ("sparse", "auto", "dense"):
        found = sparse_ffn(**leaves, **options, policy=policy)
        for a, b in zip(
            torch.autograd.grad(found, list(leaves.values()), grad),
            torch.autograd.grad(expected, list(leaves.values()), grad, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["sparse", "auto", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 256, 300), (20, 130, 257), (3, 1, 1)])
def test_lower_precision(device, policy, dtype, shape):
    """Rounding of y relative to the sum of sizes; half-precision products are kept in float32."""
    tokens, features, neurons = shape
    tensors = problem((tokens,), features, neurons, dtype=dtype)
    moved = {k: t.to(device) for k, t in tensors.items()}
    y = sparse_ffn(**moved, policy=policy)
    assert y.dtype == dtype
    expected, _ = by_formula(**tensors)
    scale = by_formula(**{k: t.abs() for k, t in tensors.items()})[0]
    assert ((y.cpu().double() - expected).abs() <= TOLERANCE[dtype] * scale + 1e-6).all()


def test_half_precision_sums_are_kept_in_float32():
    x, w = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(3, 4096, dtype=torch.bfloat16)
    active = torch.ones(1, 3, dtype=torch.bool)
    assert (rows_dot(x, w, None, 1.0) == 4096).all()
    many = torch.ones(1, 4096, dtype=torch.bool)
    assert (rows_sum(torch.ones(1, 4096), w.mT.contiguous(), many, 1.0) == 4096).all()
    assert rows_outer(torch.ones(1, 3), x, active, 1.0).dtype == torch.bfloat16


@pytest.mark.parametrize("dense_above", [1.0, 0.2])
def test_products_and_their_derivatives(dense_above):
    torch.manual_seed(0)
    x, w = (torch.randn(n, 5, dtype=DOUBLE, requires_grad=True) for n in (3, 6))
    h = torch.randn(3, 6, dtype=DOUBLE, requires_grad=True)
    active = torch.rand(3, 6) < 0.5
    for op, args, expected in (
        (rows_dot, (x, w), active * (x @ w.mT)),
        (rows_sum, (h, w), (active * h) @ w),
        (rows_outer, (h, x), (active * h).mT @ x),
    ):
        torch.testing.assert_close(op(*args, active, dense_above), expected)
        torch.library.opcheck(op, (*args, active, dense_above))

        def run(*args, op=op):
            return op(*args, active, dense_above)

        assert gradcheck(run, args)
        assert gradgradcheck(run, args)
    torch.testing.assert_close(rows_dot(x, w, None, dense_above), x @ w.mT)
    assert gradcheck(lambda x, w: rows_dot(x, w, None, dense_above), (x, w))


def test_rows_of_zeros_in_used_memory():
    """A large gradient is zero where nothing is written, whatever its memory held before."""
    h, x = torch.randn(2, 1001), torch.randn(2, 1003)
    active = torch.rand(2, 1001) < 0.01
    for _ in range(3):
        torch.full((1001, 1003), torch.nan)
        found = rows_outer(h, x, active, 1.0)
        torch.testing.assert_close(found, (active * h).mT @ x)
        found.fill_(torch.nan)
        del found


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(gated, tokens, masked):
    tensors = problem((tokens,), 4, 6, gated)
    names = ("x", "w_up", "w_down_t", "w_gate", "b_up", "b_gate", "b_down")
    args = [None if tensors[k] is None else tensors[k].requires_grad_() for k in names]
    args.append(torch.rand(6, dtype=DOUBLE) if masked else None)
    args.append(torch.rand(tokens, 6) < 0.5 if masked else None)
    torch.library.opcheck(OP, (*args, 0.1, "silu", 0.0, False, 1.0))


def test_one_and_two_threads_agree_bit_for_bit():
    if not native():
        pytest.skip("the reference takes matrix products, which may be cut by threads")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results = []
            for n, d, h in ((1, 300, 513), (7, 1030, 200), (40, 64, 100)):
                tensors = problem((n,), d, h, biased=False, dtype=torch.float32)
                leaves = [tensor.requires_grad_() for tensor in tensors.values()]
                y = sparse_ffn(*leaves)
                results += [y, *torch.autograd.grad(y.square().sum(), leaves)]
            found.append(results)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_stats_and_auto():
    tensors = problem((40,), 6, 40, biased=False, dtype=torch.float32)
    y, stats = sparse_ffn(**tensors, return_stats=True)
    assert isinstance(stats, FFNStats)
    assert not stats.dense
    full = tensors | {"b_gate": torch.full((40,), 50.0)}
    _, stats = sparse_ffn(**full, policy="auto", return_stats=True)
    assert stats.dense
    assert (stats.active == 40).all()
    assert stats.union == 1
    few = torch.rand(40, 40) < 0.1
    _, stats = sparse_ffn(**full, mask=few, policy="auto", return_stats=True)
    assert not stats.dense
    assert torch.equal(stats.active, few.sum(-1))
    torch.testing.assert_close(sparse_ffn(**tensors, policy="auto"), y, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "plain", "sequential"])
def test_pack(name):
    linears = [
        nn.Linear(4, 6, dtype=DOUBLE),
        nn.Linear(6, 4, dtype=DOUBLE),
        nn.Linear(4, 6, dtype=DOUBLE),
    ]
    up, down, gate = linears
    x = torch.randn(3, 4, dtype=DOUBLE)
    gated = name in ("llama", "mixtral")
    expected = down(F.relu(gate(x)) * up(x)) if gated else down(F.relu(up(x)))
    module = nn.Module()
    names = {
        "llama": ("up_proj", "down_proj", "gate_proj"),
        "mixtral": ("w3", "w2", "w1"),
        "plain": ("fc1", "fc2"),
    }
    if name == "sequential":
        module = nn.Sequential(up, nn.ReLU(), down)
    else:
        for attribute, layer in zip(names[name], linears, strict=False):
            setattr(module, attribute, layer)
    found = sparse_ffn(x, **pack_ffn(module))
    torch.testing.assert_close(found, expected)
    weights = list(module.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), weights), torch.autograd.grad(expected.sum(), weights)
    )


def test_pack_of_something_else():
    with pytest.raises(ValueError, match=r"module: expected linear layers named .* got ReLU"):
        pack_ffn(nn.ReLU())


def test_autocast_computes_in_its_type():
    tensors = problem((2,), 64, 30, dtype=torch.float32)
    expected = sparse_ffn(**{k: t.bfloat16() for k, t in tensors.items()})
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    for policy in ("sparse", "auto", "dense"):
        with torch.autocast("cpu", torch.bfloat16):
            found = sparse_ffn(**leaves, policy=policy)
        assert found.dtype == torch.bfloat16
        if policy == "sparse":
            assert torch.equal(found, expected)
        grads = torch.autograd.grad(found.float().sum(), list(leaves.values()))
        assert all(grad.dtype == torch.float32 for grad in grads)
    double = problem((2,), 64, 30)
    with torch.autocast("cpu", torch.bfloat16):
        found = sparse_ffn(**double)
    assert torch.equal(found, sparse_ffn(**double))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("which", ["x", "mask", "weights", "all"])
def test_vmap(gated, which):
    tensors = {k: t for k, t in problem((3, 2), 4, 5, gated).items() if t is not None}
    mask = torch.rand(3, 2, 5) < 0.6
    dims = dict.fromkeys(tensors)
    if which in ("x", "all"):
        dims["x"] = 0
    else:
        tensors["x"] = tensors["x"][0]
    if which in ("weights", "all"):
        tensors["w_up"] = torch.stack([tensors["w_up"], -tensors["w_up"], 2 * tensors["w_up"]])
        dims["w_up"] = 0
    dim = 0 if which in ("mask", "all") else None

    def run(tensors, mask):
        return sparse_ffn(**tensors, mask=mask)

    found = torch.func.vmap(run, (dims, dim))(tensors, mask if dim == 0 else mask[0])
    for i in range(3):
        row = {k: t if dims[k] is None else t[i] for k, t in tensors.items()}
        torch.testing.assert_close(found[i], run(row, mask[i] if dim == 0 else mask[0]))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"policy": "auto"}, {"policy": "dense"}])
def test_compiles_in_one_graph(options):
    tensors = {k: t.requires_grad_() for k, t in problem((2, 2), 6, 9).items()}
    indices = torch.tensor([0, 3, 5, 8, -1]).expand(2, 2, 5)

    def run(tensors, indices):
        return sparse_ffn(**tensors, indices=indices, threshold=0.1, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = compiled(tensors, indices), run(tensors, indices)
    torch.testing.assert_close(found, expected)
    leaves = list(tensors.values())
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    )


def test_meta():
    tensors = {k: t.to("meta") for k, t in problem((2, 3), 4, 5).items()}
    y, stats = sparse_ffn(**tensors, return_stats=True)
    assert y.shape == (2, 3, 4)
    assert stats.active.shape == (2, 3)
    assert y.is_meta


def test_forward_mode_is_refused():
    tensors = problem()
    with forward_ad.dual_level():
        tensors["x"] = forward_ad.make_dual(tensors["x"], torch.ones_like(tensors["x"]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            sparse_ffn(**tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 4)}, r"x: expected last dimension 5"),
        ({"x": torch.ones(3, 5, dtype=torch.long)}, r"x: expected a floating-point"),
        ({"x": torch.ones(3, 5, dtype=DOUBLE)}, r"w_up: expected the type of x, torch.float64"),
        ({"w_up": torch.ones(7)}, r"w_up: expected shape \(H, D\), got \(7,\)"),
        ({"w_down_t": torch.ones(5, 7)}, r"w_down_t: expected shape \(7, 5\), got \(5, 7\)"),
        ({"w_gate": torch.ones(7, 4)}, r"w_gate: expected shape \(7, 5\), got \(7, 4\)"),
        ({"w_gate": None}, r"b_gate: got a bias, but there is no w_gate"),
        ({"b_up": torch.ones(5)}, r"b_up: expected shape \(7,\), got \(5,\)"),
        ({"b_down": torch.ones(7)}, r"b_down: expected shape \(5,\), got \(7,\)"),
        ({"w_up": torch.ones(7, 5, device="meta")}, r"w_up: expected it on cpu, as x is, got meta"),
        ({"activation": "gelu"}, r"activation: expected one of relu, .*, got 'gelu'"),
        ({"shift": 0.1}, r"shift: only shifted_relu has one, got 0.1 for relu"),
        ({"threshold": -0.1}, r"threshold: expected a number ≥ 0, got -0.1"),
        ({"threshold": float("nan")}, r"threshold: expected a number ≥ 0"),
        ({"threshold": torch.ones(5)}, r"threshold: expected a scalar or shape \(7,\), got \(5,\)"),
        ({"threshold": -torch.ones(7)}, r"threshold: expected numbers ≥ 0, got -1"),
        ({"threshold_on": "gate"}, r"threshold_on: expected one of act, product, got 'gate'"),
        ({"policy": "fast"}, r"policy: expected one of sparse, auto, dense, got 'fast'"),
        ({"top_k": 0}, r"top_k: expected 1 to 7, the number of neurons, got 0"),
        ({"top_k": 8}, r"top_k: expected 1 to 7, the number of neurons, got 8"),
        ({"mask": torch.ones(3, 7)}, r"mask: expected bool of shape \(3, 7\)"),
        ({"mask": torch.ones(7, dtype=torch.bool)}, r"mask: expected bool of shape \(3, 7\)"),
        ({"indices": torch.ones(3, 2)}, r"indices: expected int32 or int64"),
        ({"indices": torch.ones(2, 2, dtype=torch.long)}, r"indices: expected shape \(3, 'K'\)"),
        ({"indices": torch.tensor([[0], [7], [-1]])}, r"indices: expected -1 to 6, got -1 to 7"),
        (
            {"mask": torch.ones(3, 7, dtype=torch.bool), "indices": torch.zeros(3, 1).long()},
            r"mask, indices: expected one of them, got both",
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        sparse_ffn(**(problem(dtype=torch.float32) | change))
