"""Pictures of every d-th pixel, against slices of whole ones."""

import itertools

import pytest
import torch

from torchzoo.ops import rasterize
from torchzoo.splatting import (
    Cameras,
    DilatedRenderer,
    GaussianScene,
    dilated_pixels,
    photometric_loss,
)
from torchzoo.testing.work import CountElements

DOUBLE = torch.float64
OFFSETS = [(d, o) for d in (1, 2, 3) for o in itertools.product(range(d), repeat=2)]


def splats(count, *, spread=1.0, scale=0.1, seed=0, dtype=DOUBLE):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(count, *shape, generator=random, dtype=dtype)

    scales = scale * (0.4 * draw(3)).exp()
    return GaussianScene.from_tensors(
        spread * draw(3), draw(4), scales.log(), draw(), 0.5 * draw(4, 3)
    )


def gradients(scene, image, above):
    scene.zero_grad()
    (image * above).sum().backward()
    return {name: p.grad.clone() for name, p in scene.named_parameters()}


@pytest.mark.claim(
    159,
    "A dilated picture is the slice of the full one, and so are its gradients, for every spacing "
    "and offset and sides that are not multiples of it",
    tolerance=1e-6,
)
@pytest.mark.parametrize(("d", "offset"), OFFSETS)
@pytest.mark.parametrize("kernel", ["gaussian", "analytic"])
def test_dilated_is_sliced(kernel, d, offset):
    scene, (x, y) = splats(40), offset
    cameras = Cameras.orbit(2, radius=4.0, width=71, height=53, dtype=DOUBLE)
    full = scene.render(cameras, kernel=kernel)
    part = scene.render(cameras, kernel=kernel, dilation=d, offset=offset)
    rows, columns = dilated_pixels(71, 53, d, offset)
    assert part.image.shape == (2, -(-(53 - y) // d), -(-(71 - x) // d), 3)
    sliced = full.image[:, y::d, x::d]
    assert torch.equal(full.image[:, rows, columns], sliced)
    assert (part.image - sliced).abs().max() <= 1e-6
    assert sliced.abs().mean() > 0.05
    above = torch.randn(sliced.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    expected = gradients(scene, sliced, above)
    for name, found in gradients(scene, part.image, above).items():
        assert (found - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.claim(
    159,
    "All offsets together take every pixel once; the L1 losses of their pictures, weighted by "
    "pixels, have the whole picture's for mean",
    tolerance=1e-12,
)
@pytest.mark.parametrize(("width", "height", "d"), [(7, 5, 1), (8, 6, 2), (7, 5, 2), (10, 11, 3)])
def test_offsets_tile_the_picture(width, height, d):
    random = torch.Generator().manual_seed(0)
    image, target = torch.rand(2, height, width, 3, generator=random, dtype=DOUBLE)
    hits, total = torch.zeros(height, width, dtype=torch.long), 0.0
    for offset in itertools.product(range(d), repeat=2):
        at = dilated_pixels(width, height, d, offset)
        assert torch.equal(image[at], image[offset[1] :: d, offset[0] :: d])
        hits[at] += 1
        total += (image[at] - target[at]).abs().mean() * at[0].numel() / (width * height)
    assert (hits == 1).all()
    assert total.item() == pytest.approx((image - target).abs().mean().item(), abs=1e-12)


@pytest.mark.claim(
    159,
    "No tile is missed by splats that end within half a pixel of a tile's edge",
    tolerance=1e-6,
)
@pytest.mark.parametrize("offset", [(0, 0), (2, 2)])
def test_splats_that_end_at_the_edges_of_tiles(offset):
    count, d, size, sigma = 1000, 3, 240, 2.0
    random = torch.Generator().manual_seed(5)
    reach = (2 * torch.log(torch.tensor(255 * 0.7, dtype=DOUBLE))).sqrt() * sigma
    edge = 16 * d * torch.randint(0, 6, (count, 2), generator=random) + torch.tensor(offset)
    beyond = torch.rand(count, 2, generator=random, dtype=DOUBLE) - 0.5
    side = 2.0 * torch.randint(2, (count, 2), generator=random) - 1
    place = edge + side * reach + beyond  # one of the two ends of the box
    found = {
        "means": torch.cat([place, torch.full((count, 1), 5.0, dtype=DOUBLE)], 1),
        "quats": torch.tensor([[1.0, 0, 0, 0]], dtype=DOUBLE).expand(count, 4),
        "scales": torch.full((count, 3), (sigma**2 - 0.3) ** 0.5, dtype=DOUBLE),
        "opacities": torch.full((count,), 0.7, dtype=DOUBLE),
        "features": torch.rand(count, 3, generator=random, dtype=DOUBLE),
        "viewmats": torch.eye(4, dtype=DOUBLE)[None],
        "Ks": torch.eye(3, dtype=DOUBLE)[None],
        "width": size,
        "height": size,
    }
    options = {"camera_model": "orthographic", "t_stop": 0.0}
    full = rasterize(**found, **options)
    part = rasterize(**found, **options, dilation=d, offset=offset)
    x, y = offset
    assert (part.image - full.image[:, y::d, x::d]).abs().max() <= 1e-6


@pytest.mark.claim(
    159,
    "At every second pixel of a dense picture there are 0.4 times as many pairs of splats and "
    "tiles, and less than half of the elements are read and written in a step",
    tolerance=None,
)
def test_work_of_dilated_pictures():
    count = 2000
    scene = splats(count, spread=0.7, scale=0.06, dtype=torch.float32)
    cameras = Cameras.orbit(1, radius=4.0, width=256, height=256)
    target = torch.full((1, 256, 256, 3), 0.5)
    pairs, elements = [], []
    for d in (1, 2):
        with CountElements() as work:
            output = scene.render(cameras, dilation=d)
            photometric_loss(output.image, target[:, ::d, ::d]).backward()
        elements.append(work.elements)
        pairs.append(output.info["n_isects"].item())
    assert pairs[0] > 5 * count
    assert pairs[1] <= 1.6 * pairs[0] / 4 + count
    assert elements[1] <= 0.5 * elements[0]


def test_renderer_draws_other_pixels_every_time():
    scene = splats(30)
    cameras = Cameras.orbit(2, radius=4.0, width=21, height=16, dtype=DOUBLE)
    whole = scene.render(cameras).image.detach()
    behind = torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
    renderer = DilatedRenderer(3, generator=torch.Generator().manual_seed(0))
    y, x = torch.meshgrid(torch.arange(16), torch.arange(21), indexing="ij")
    places = torch.stack([x, y], -1).expand(2, -1, -1, -1)
    seen = set()
    for _ in range(60):
        output, (first, *_) = renderer(scene, cameras, places)
        offset = tuple(first[0, 0].tolist())
        assert (output.image - whole[:, offset[1] :: 3, offset[0] :: 3]).abs().max() <= 1e-9
        seen.add(offset)
    assert seen == set(itertools.product(range(3), repeat=2))
    output, target = renderer(scene, cameras, whole, backgrounds=behind)
    transparent = (1 - output.alpha[..., None]).detach() * behind
    torch.testing.assert_close(output.image.detach(), target + transparent, rtol=0, atol=1e-9)
    assert repr(renderer) == "DilatedRenderer(3)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 6, 0, (0, 0)), "d: got 0"),
        ((8, 6, 7, (0, 0)), "d: got 7, expected 1 to 6"),
        ((8, 6, 2, (2, 0)), "offset: got"),
        ((8, 6, 2, (0, -1)), "offset: got"),
        ((8, 6, 2, (0,)), "offset: got"),
    ],
)
def test_bad_grids(arguments, words):
    with pytest.raises(ValueError, match=words):
        dilated_pixels(*arguments)


def test_bad_renderers():
    with pytest.raises(ValueError, match="d: got 0"):
        DilatedRenderer(0)
    cameras = Cameras.orbit(2, radius=4.0, width=8, height=6, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"images: got \(2, 8, 6, 3\), expected \(2, 6, 8\)"):
        DilatedRenderer(2)(splats(3), cameras, torch.zeros(2, 8, 6, 3))
    with pytest.raises(ValueError, match="dilation: got 7"):
        DilatedRenderer(7)(splats(3), cameras, torch.zeros(2, 6, 8, 3))
