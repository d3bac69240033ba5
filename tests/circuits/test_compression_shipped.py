"""The shipped circuits compress as their manifest says."""

import io

import pytest
import torch
from PIL import Image

import torchzoo
from torchzoo.circuits import CircuitCodec, archive
from torchzoo.data.photographs import photograph
from torchzoo.experiments.circuits import pretrain
from torchzoo.hub import manifest


def test_every_shipped_circuit_has_its_recipe():
    for name, recipe in pretrain.RECIPES.items():
        entry = manifest()[name]
        assert entry["class"] == "torchzoo.circuits.circuit:Circuit"
        assert entry["command"] == f"{pretrain.COMMAND} {name}"
        assert entry["data"] == recipe.data


@pytest.mark.claim(
    82,
    "1,797 digits come back exactly and take at most 0.1 % more than their ideal length",
    tolerance=1e-3,
)
def test_all_digits_take_their_ideal_length():
    x = torch.cat(pretrain.digit_levels(0))
    circuit = torchzoo.from_pretrained(pretrain.DIGIT_MODEL)
    codec = CircuitCodec(circuit, precision=20, block_size=1024)
    length = codec.measure(x)
    assert 0 <= length.payload / length.ideal - 1 <= 1e-3
    assert torch.equal(codec.decode(codec.encode(x)), x)


def test_digits_take_what_the_manifest_says():
    _, test = pretrain.digit_levels(0)
    circuit = torchzoo.from_pretrained(pretrain.DIGIT_MODEL)
    codec = CircuitCodec(circuit, precision=20, block_size=1024)
    data = codec.encode(test)
    assert torch.equal(codec.decode(data), test)
    metric = manifest()[pretrain.DIGIT_MODEL]["metric"]["test_bits_per_dim"]
    assert codec.bits_per_dim(test) == pytest.approx(metric, abs=1e-3)


@pytest.mark.claim(
    82, "A photograph's half that the shipped model never saw takes at least 20 % less than as PNG"
)
def test_a_photograph_takes_less_than_png():
    pixels = (255 * photograph("china")).round().to(torch.uint8)[160:288, 400:528]
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", optimize=True)
    data = archive.pack_image(pixels)
    assert torch.equal(archive.unpack(data).pixels, pixels)
    assert len(data) < 0.8 * len(buffer.getvalue())


def test_text_takes_what_the_manifest_says():
    _, windows = pretrain.text_windows()
    text = bytes(windows[:100].flatten().tolist())
    data = archive.pack_bytes(text, "notes.txt")
    assert archive.unpack(data).data == text
    assert archive.unpack(data).name == "notes.txt"
    assert len(data) < len(text) / 2
