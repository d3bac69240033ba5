"""Click maps and the focal loss against loops over pixels."""

import math

import pytest
import torch

from torchzoo.gp import (
    Segmentation,
    click_disks,
    click_violations,
    disk_points,
    gpcis_loss,
    normalized_focal_loss,
)


def test_disks():
    points = torch.tensor([[[2, 3], [9, 0], [4, 4]], [[0, 0], [1, 1], [2, 2]]])
    labels = torch.tensor([[1, -1, 1], [0, 0, -1]])
    rows = disk_points(points, labels)
    assert rows[0].tolist() == [
        [2, 3, 0], [-1, -1, -1], [4, 4, 2], [-1, -1, -1], [9, 0, 1], [-1, -1, -1],
    ]  # fmt: skip
    for radius, given in ((5, {}), (2, {"radius": 2})):
        found = click_disks(rows, (10, 12), **given)
        expected = torch.zeros(2, 2, 10, 12)
        for b, channel, y, x in ((0, 0, 2, 3), (0, 1, 9, 0), (0, 0, 4, 4), (1, 1, 2, 2)):
            for i in range(10):
                for j in range(12):
                    if math.hypot(i - y, j - x) <= radius:
                        expected[b, channel, i, j] = 1
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="M even"):
        click_disks(rows[:, :5], (10, 12))
    with pytest.raises(ValueError, match="radius"):
        click_disks(rows, (10, 12), radius=-1)


@pytest.mark.claim(
    67,
    "The loss on the mask is the focal loss with weights (1 - p)^2 of mean 1 in each image, half "
    "for either class, the mean held",
    tolerance=1e-10,
)
def test_focal_loss():
    torch.manual_seed(0)
    logits = (2 * torch.randn(2, 1, 3, 4)).double().requires_grad_()
    mask = (torch.rand(2, 1, 3, 4) > 0.6).double()

    def written_out(values, scales):
        total = 0.0
        for b in range(2):
            for f, y in zip(values[b].flatten(), mask[b].flatten(), strict=True):
                p = torch.sigmoid(f) if y > 0 else 1 - torch.sigmoid(f)
                total = total - 0.5 * (1 - p) ** 2 / scales[b] * p.log() / 24
        return total

    with torch.no_grad():
        p = torch.where(mask > 0, logits.sigmoid(), 1 - logits.sigmoid())
        scales = ((1 - p) ** 2).mean((1, 2, 3))
    found = normalized_focal_loss(logits, mask)
    expected = written_out(logits, scales)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    one, two = (torch.autograd.grad(value, logits)[0] for value in (found, expected))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    one_class = normalized_focal_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), alpha=0.3)
    assert one_class.item() == pytest.approx(0.3 * math.log(2))
    whole = gpcis_loss(Segmentation(logits, torch.ones(2), torch.full((2,), 3.0)), mask)
    assert (whole - found).item() == pytest.approx(0.004)
    sure = torch.full((1, 2, 2), 200.0, requires_grad=True)
    normalized_focal_loss(sure, torch.ones(1, 2, 2)).backward()
    assert sure.grad.isfinite().all()
    with pytest.raises(ValueError, match="mask"):
        normalized_focal_loss(logits, mask[:1])


def test_violations():
    logits = torch.tensor([[[[0.5, -0.5], [0.0, 2.0]]]])
    points = torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1], [-1, 9]]])
    labels = torch.tensor([[1, 1, -1, -1, 0]])
    found = click_violations(logits, points, labels)
    assert found.tolist() == [[False, True, True, True, False]]
