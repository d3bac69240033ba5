import pytest
import torch

from torchzoo.experiments.quickstart.model import ZooVisionModel


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small():
    """A small model, half annealed, so that tokens use some experts and not others."""
    torch.manual_seed(0)
    model = ZooVisionModel(
        3, dim=8, depth=2, num_heads=2, num_experts=3, hidden_dim=5, anneal_steps=10
    )
    with torch.no_grad():
        for gate in model.gates:
            gate.weight.mul_(4)
    for _ in range(5):
        model.anneal()
    return model.eval()
