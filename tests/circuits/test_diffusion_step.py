"""Steered steps of schedulers, for every kind of prediction."""

from types import SimpleNamespace

import pytest
import torch

from torchzoo.circuits import CategoricalLeaf, Circuit, TractableSteering, hclt
from torchzoo.circuits.steering import linear_schedule

F64 = torch.float64


def make(size, categories):
    torch.manual_seed(4)
    leaf = CategoricalLeaf(categories)
    return Circuit(hclt([-1, *range(size - 1)]), leaf, num_units=3, dtype=F64)


class Scheduler:
    """A deterministic scheduler in the style of diffusers, with 10 steps."""

    alphas_cumprod = torch.tensor([linear_schedule((t + 1) / 10) for t in range(10)])

    def __init__(self, prediction_type):
        self.config = SimpleNamespace(prediction_type=prediction_type, num_train_timesteps=10)

    def step(self, model_output, timestep, sample):
        share = self.alphas_cumprod[timestep].double()
        before = self.alphas_cumprod[timestep - 1].double() if timestep else torch.ones(())
        kind = self.config.prediction_type
        if kind == "sample":
            x_0 = model_output
        elif kind == "epsilon":
            x_0 = (sample - (1 - share).sqrt() * model_output) / share.sqrt()
        else:
            x_0 = share.sqrt() * sample - (1 - share).sqrt() * model_output
        noise = (sample - share.sqrt() * x_0) / (1 - share).sqrt()
        following = before.sqrt() * x_0 + (1 - before).sqrt() * noise
        return SimpleNamespace(prev_sample=following, pred_original_sample=x_0)


@pytest.mark.claim(
    64,
    "As a scheduler's step the hook replaces its predicted original sample by the steered one, "
    "and leaves other steps bitwise as they are",
    tolerance=1e-6,
)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_steps_of_a_scheduler(kind):
    circuit = make(4, 5)
    steering = TractableSteering(circuit, steer_fraction=0.3)
    x_known = torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=F64).expand(3, 2, 2)
    mask = torch.tensor([[True, True], [False, False]])
    output, sample = torch.randn(2, 3, 2, 2, dtype=F64)
    scheduler = Scheduler(kind)
    expected = {t: scheduler.step(output, t, sample) for t in (7, 8)}
    scheduler.step = steering.as_callback(
        scheduler,
        x_known=x_known,
        mask=mask,
        data_var=0.3,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(scheduler.step(output, 7, sample).prev_sample, expected[7].prev_sample)
    found = scheduler.step(output, torch.tensor(8), sample)
    share = linear_schedule(0.9)
    by_hand = steering.steer(
        expected[8].pred_original_sample,
        torch.full((3, 2, 2), 0.3 * (1 - share) / (0.3 * share + 1 - share), dtype=F64),
        sample,
        8,
        10,
        x_known=x_known,
        mask=mask,
        alpha_bar=share,
        generator=torch.Generator().manual_seed(0),
    )
    assert (found.pred_original_sample - by_hand).abs().max() < 1e-6
    assert not torch.equal(by_hand, expected[8].pred_original_sample)
    with pytest.raises(ValueError, match="scheduler: got prediction_type 'flow'"):
        steering.as_callback(Scheduler("flow"), x_known=x_known, mask=mask)


@pytest.mark.claim(
    64, "A scheduler's hook takes the variance of a Gaussian x_0 given x_t", tolerance=1e-6
)
def test_variance_in_a_scheduler():
    class Recording(TractableSteering):
        def steer(self, x0_mean, x0_var, *args, **kwargs):
            seen.append(x0_var)
            return x0_mean

    seen, x = [], torch.randn(3, 2, 2)
    scheduler = Scheduler("epsilon")
    steering = Recording(make(4, 5), steer_fraction=1.0)
    mask = torch.zeros(2, 2, dtype=torch.bool)
    step = steering.as_callback(scheduler, x_known=x, mask=mask, data_var=0.3)
    for t in (1, 4, 8):
        step(x, t, x)
        share = linear_schedule((t + 1) / 10)
        expected = 1 / (1 / 0.3 + share / (1 - share))
        assert (seen[-1] - expected).abs().max() < 1e-6
        assert seen[-1].shape == x.shape
