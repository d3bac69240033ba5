"""Files of compact scenes: their size to the byte, and what is read from them."""

import math

import pytest
import torch

from torchzoo.splatting import Cameras
from torchzoo.splatting.compact import Compact3DGS
from torchzoo.splatting.compact_file import (
    huffman_decode,
    huffman_encode,
    morton_order,
    pack_bytes,
    pack_codes,
    read_parts,
    unpack_bytes,
    unpack_codes,
    write_parts,
)

FIELD = {"levels": 4, "log2_table": 8, "hidden": 16}


def scene(count=201):
    random = torch.Generator().manual_seed(0)
    xyz = 0.5 * torch.randn(count, 3, generator=random)
    torch.manual_seed(0)
    made = Compact3DGS.from_points(xyz, xyz, field=FIELD, init_opacity=0.6)
    made.quats.data = torch.randn(count, 4, generator=random)
    made.log_scales.data += 0.5 * torch.randn(count, 3, generator=random)
    made.color.grid.table.data *= 5000
    made.mask_logits.data[:10] = -9.0
    made.start_vq(generator=random)
    return made


def views():
    return Cameras.orbit(2, radius=3.0, width=32, height=32)


@pytest.mark.claim(
    26,
    "A file has 17 bytes a splat, and of fixed parts the codebooks, the grid and the network",
    tolerance=0,
)
def test_size_is_the_formula(tmp_path):
    made = scene()
    path = tmp_path / "scene.tzc"
    sizes = made.save(path)
    count = 191
    network = (8 + 9) * 16 + 16 + 16 * 16 + 16 + 16 * 3 + 3
    assert sizes | {"header": 0} == {
        "header": 0,
        "means": 6 * count,
        "opacities": 2 * count,
        "scale_codes": math.ceil(count * 36 / 8),
        "rotation_codes": math.ceil(count * 36 / 8),
        "codebooks": 64 * 6 * (3 + 4) * 4,
        "grid": 2 * 4 * 256 * 2,
        "mlp": 2 * network,
    }
    assert sum(sizes.values()) == path.stat().st_size
    assert sizes["header"] < 600
    packed = made.save(path, huffman=True)
    assert sum(packed.values()) == path.stat().st_size
    assert packed.keys() == sizes.keys()


@pytest.mark.claim(
    26, "A scene read from its file looks the same to 45 dB, with the same codes", tolerance=None
)
def test_round_trip(tmp_path):
    made = scene()
    made.save(tmp_path / "scene.tzc")
    again = Compact3DGS.load(tmp_path / "scene.tzc")
    stored = made.finalize()
    order = morton_order(stored.means)
    assert torch.equal(again.scale_codes, stored.scale_codes[order])
    assert torch.equal(again.rotation_codes, stored.rotation_codes[order])
    assert torch.equal(again.scale_vq.codebooks, made.scale_vq.codebooks)
    assert torch.equal(again.means, stored.means[order].half().float())
    with torch.no_grad():
        images = [s.render(views()).image for s in (made, stored, again)]
    torch.testing.assert_close(images[1], images[0], atol=1e-5, rtol=0)
    error = (images[0] - images[2]).square().mean()
    assert -10 * error.log10() >= 45
    assert images[0].std() > 0.02
    second = again.save(tmp_path / "again.tzc")
    assert (tmp_path / "again.tzc").stat().st_size == sum(second.values())
    assert torch.equal(Compact3DGS.load(tmp_path / "again.tzc").scale_codes, again.scale_codes)


def test_entropy_coded_round_trip(tmp_path):
    made = scene()
    made.save(tmp_path / "scene.tzc", huffman=True)
    again, stored = Compact3DGS.load(tmp_path / "scene.tzc"), made.finalize()
    order = morton_order(stored.means)
    assert torch.equal(again.scale_codes, stored.scale_codes[order])
    table = made.color.grid.table.detach()
    step = (table.max() - table.min()) / 255
    error = (again.color.grid.table - table).abs()
    assert (error <= torch.where(table.abs() <= 0.1, 0.1 + step, 0.51 * step)).all()
    assert (again.opacities - stored.opacities[order]).abs().max() < 1e-3


@pytest.mark.claim(
    26, "Huffman streams decode exactly and take no less than the entropy, nor a bit a symbol more"
)
@pytest.mark.parametrize("alphabet", [2, 64, 256])
def test_huffman(alphabet):
    random = torch.Generator().manual_seed(alphabet)
    weights = torch.rand(alphabet, generator=random) ** 8 + 1e-6
    symbols = torch.multinomial(weights, 3000, replacement=True, generator=random)
    data = huffman_encode(symbols, alphabet)
    assert torch.equal(huffman_decode(data, 3000, alphabet).long(), symbols)
    shares = torch.bincount(symbols) / 3000
    entropy = -(shares[shares > 0] * shares[shares > 0].log2()).sum().item()
    bits = 8 * (len(data) - alphabet)  # the table of lengths aside
    assert 3000 * entropy <= bits < 3000 * (entropy + 1) + 8


def test_huffman_words_are_canonical():
    # counts 4, 2, 1, 1 make words 0, 10, 110, 111
    symbols = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    data = huffman_encode(symbols, 4)
    assert data == bytes([1, 2, 3, 3, 0b00001010, 0b11011100])
    assert huffman_decode(huffman_encode(torch.full((9,), 5), 8), 9, 8).tolist() == [5] * 9
    assert huffman_decode(huffman_encode(torch.empty(0), 8), 0, 8).tolist() == []
    fibonacci = [1, 1]
    while len(fibonacci) < 18:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    long = torch.repeat_interleave(torch.arange(18), torch.tensor(fibonacci))
    coded = huffman_encode(long, 18)
    assert max(coded[:18]) == 17  # words as long as they can be
    assert torch.equal(huffman_decode(coded, len(long), 18).long(), long)


def test_packing():
    codes = torch.tensor([[1, 63], [32, 0]])
    assert pack_codes(codes, 6) == bytes([0b00000111, 0b11111000, 0b00000000])
    assert unpack_codes(pack_codes(codes, 6), 4, 6).tolist() == [1, 63, 32, 0]
    values = torch.tensor([-1.0, 0.0, 0.05, 0.5, 1.55])
    found = unpack_bytes(pack_bytes(values, prune=0.1), 5)
    torch.testing.assert_close(found, torch.tensor([-1, 0, 0, 0.5, 1.55]), atol=6e-3, rtol=0)
    assert unpack_bytes(pack_bytes(torch.full((3,), 0.25)), 3).tolist() == [0.25] * 3


def test_morton_order_follows_the_curve():
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    order = morton_order(corners)
    assert corners[order].tolist() == [[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]  # x fastest
    assert morton_order(torch.empty(0, 3)).shape == (0,)


def test_damaged_files(tmp_path):
    made = scene(20)
    path = tmp_path / "scene.tzc"
    made.save(path)
    data = path.read_bytes()
    for broken in (b"PK" + data[2:], data[:-1], data[:40] + b"\0" + data[41:], data[:6]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="compact scene"):
            Compact3DGS.load(path)
    header, parts = read_parts(data)
    for changed in (
        (header | {"num_gaussians": 10**9}, parts),
        (header, parts | {"grid": parts["grid"][:-2]}),
        (header, parts | {"more": b""}),
        (header | {"codebook_size": 48}, parts),
        ({"huffman": False}, parts),
    ):
        path.write_bytes(write_parts(*changed))
        with pytest.raises(ValueError, match=r"scene\.tzc"):
            Compact3DGS.load(path)
    with pytest.raises(ValueError, match="Huffman"):
        huffman_decode(bytes([1, 1, 1, 0]), 3, 3)
    with pytest.raises(ValueError, match="Huffman"):
        huffman_decode(bytes([1, 1, 0, 0]), 100, 3)


def test_nothing_is_written_where_it_fails(tmp_path, monkeypatch):
    made = scene(20)
    path = tmp_path / "scene.tzc"
    made.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("torchzoo.splatting.compact_file.write_parts", lambda *_: "no bytes")
    with pytest.raises(TypeError):
        made.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["scene.tzc"]
