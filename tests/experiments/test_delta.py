"""The delta experiment: its data, its verdict rules, and a short run."""

import pytest
import torch

from torchzoo import experiment
from torchzoo.data.gratings import CLASSES, moving_gratings
from torchzoo.experiment import Measurement
from torchzoo.experiments.sparsity.delta import EXPERIMENT, FrameNet, accuracy_name, nonzero_name


def test_clips_move_every_second_frame_over_a_still_background():
    clips, labels = moving_gratings(50, noise=0.0, generator=torch.Generator().manual_seed(0))
    assert clips.shape == (50, 12, 16, 16, 1)
    assert set(labels.tolist()) == set(range(CLASSES))
    changed = (clips[:, 1:] != clips[:, :-1]).flatten(2).double().mean((0, 2))
    assert changed[0::2].max() == 0
    assert (changed[1::2] > 0.2).all()
    assert (changed[1::2] < 0.45).all()  # patch and what it uncovers: at most 9 * 9 of 16 * 16
    noisy, _ = moving_gratings(50, generator=torch.Generator().manual_seed(0))
    still = (noisy - clips).std()
    assert still.item() == pytest.approx(0.02, rel=0.02)


def test_gratings_have_the_class_orientation_and_frequency():
    """Without background the spectrum of a large patch peaks where the class says."""
    clips, labels = moving_gratings(
        40, frames=1, size=32, patch=32, noise=0.0, generator=torch.Generator().manual_seed(1)
    )
    spectrum = torch.fft.fft2(clips[:, 0, ..., 0]).abs()
    for power, label in zip(spectrum, labels.tolist(), strict=True):
        row, column = divmod(int(power[:, :17].argmax()), 17)
        frequency = torch.tensor([(row + 16) % 32 - 16, column]) / 32
        angle = torch.atan2(frequency[0], frequency[1]) % torch.pi
        turn = (angle - torch.pi / 4 * (label % 4) + torch.pi / 2) % torch.pi - torch.pi / 2
        assert abs(turn) < 0.2
        assert frequency.norm() == pytest.approx(0.125 * (1 + label // 4), abs=0.03)


def test_patch_must_fit():
    with pytest.raises(ValueError, match="patch: expected 1 … 4"):
        moving_gratings(1, size=4, patch=5)


def test_arms_start_from_the_same_function():
    dense, l1 = FrameNet("dense"), FrameNet("L1", 1.0)
    delta = FrameNet("delta", 1.0)
    for arm in (l1, delta):
        missing = arm.load_state_dict(dense.state_dict(), strict=False)
        assert not missing.unexpected_keys
        assert all(key.endswith("threshold") for key in missing.missing_keys)
    clips, _ = moving_gratings(3)
    assert torch.equal(dense(clips), l1(clips))
    with torch.no_grad():
        for parameter in (delta.act1, delta.act2, delta.act3):
            parameter.threshold.fill_(1e-7)
    torch.testing.assert_close(dense(clips), delta(clips), atol=1e-4, rtol=1e-4)


def measured(**figures):
    base = {
        nonzero_name("dense", "short"): (0.5, 0.5, 0.5),
        nonzero_name("L1", "short"): (0.3, 0.3, 0.3),
        nonzero_name("delta", "short"): (0.19, 0.2, 0.2),
        accuracy_name("dense", "short"): (0.98, 0.98, 0.98),
        accuracy_name("L1", "short"): (0.9, 0.92, 0.91),
        accuracy_name("delta", "short"): (0.91, 0.92, 0.9),
        accuracy_name("dense", "long"): (0.98, 0.98, 0.98),
        accuracy_name("delta", "long"): (0.95, 0.95, 0.95),
        "speed-up of the folded dense part": (2.0, 2.0, 2.0),
        "native step": (1.0, 1.0, 1.0),
    }
    return {name: Measurement(name, values) for name, values in (base | figures).items()}


def outcomes(figures):
    return [criterion.test(figures)[0] for criterion in EXPERIMENT.criteria]


def test_verdict_rules():
    assert outcomes(measured()) == [True, True, True, True]
    dense_like = {nonzero_name("delta", "short"): (0.21, 0.21, 0.21)}
    assert outcomes(measured(**dense_like)) == [False, True, True, True]
    worse = {accuracy_name("delta", "short"): (0.88, 0.9, 0.89)}
    assert outcomes(measured(**worse)) == [True, False, True, True]
    denser = {nonzero_name("L1", "short"): (0.1, 0.1, 0.1)}
    assert outcomes(measured(**denser)) == [True, False, True, True]
    no_drop = {accuracy_name("dense", "short"): (0.92, 0.9, 0.91)}
    assert outcomes(measured(**no_drop)) == [True, True, None, True]
    lost = {accuracy_name("delta", "long"): (0.9, 0.9, 0.9)}
    assert outcomes(measured(**lost)) == [True, True, False, True]
    assert outcomes(measured(**{"native step": (0.0, 0.0, 0.0)})) == [True, True, True, None]


def test_smoke():
    result = experiment.reproduce(EXPERIMENT, budget="smoke")
    figures = result.measured()
    for layer in (1, 2, 3):
        assert figures[f"step {layer}, start"].mean == pytest.approx(0.1)
        assert figures[f"step {layer}, end"].mean > 0
    assert 0 < figures[nonzero_name("delta", "short")].mean < 1
    assert figures["rate, L1"].values == figures["rate, L1"].values[:1] * 2  # one pick for all
