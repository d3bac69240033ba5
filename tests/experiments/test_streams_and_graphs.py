"""Benchmarks of video streams and of graph work: what they compare computes the same."""

import numpy as np
import pytest
import torch

from torchzoo.experiments.ops import graph, video
from torchzoo.experiments.ops.spgemm import rmat, uniform
from torchzoo.sparsity import DeltaActivation, csr

CPU = torch.device("cpu")


@pytest.mark.parametrize("camera", video.CAMERAS)
def test_stream_and_whole_network_agree(camera):
    """And a camera that moves more has more multiplied."""
    calls = video.contenders(CPU, camera, side=16, epochs=1)
    torch.testing.assert_close(calls["torchzoo"](), calls["whole"](), rtol=1e-4, atol=1e-4)
    model = video.trained(side=16, epochs=1)
    assert any(m.fan_out > 0 for m in model.modules() if isinstance(m, DeltaActivation))


def test_work_is_what_the_kernels_did():
    done = {camera: video.work(camera, side=32, epochs=1) for camera in video.CAMERAS}
    per_frame = 16 * 16 * 32 * 27 - 0  # of the first convolution, edges aside
    for macs, dense in done.values():
        assert 0 < macs < dense
        assert dense > (video.FRAMES - 1) * per_frame
    assert done["stands still"][0] < done["moves every 8th frame"][0] < done["pans"][0]


def test_graph_contenders_agree():
    calls = graph.triangle_calls(CPU, lambda: rmat(7, 600))
    found = calls["torchzoo"]().numpy()
    assert found.sum() > 0
    for name in ("scipy", "scipy, by degree"):
        assert np.array_equal(np.asarray(calls[name]()).ravel(), found)
    calls = graph.hop_calls(CPU, lambda: uniform(80, 2))
    expected = calls["scipy"]().toarray()
    assert np.array_equal(csr.to_scipy(calls["torchzoo"]()).toarray(), expected)
    assert set(np.unique(expected)) == {0, 1, 2}
    calls = graph.galerkin_calls(CPU, side=8, dims=3)
    expected = calls["scipy"]().toarray()
    for name in ("torchzoo", "torch"):
        np.testing.assert_allclose(calls[name]().to_dense().numpy(), expected, atol=1e-12)
    calls = graph.solver_calls(CPU, side=24)
    expected = calls["scipy, direct"]()
    for name in ("torchzoo", "scipy, conjugate gradients"):
        np.testing.assert_allclose(np.asarray(calls[name]()), expected, rtol=1e-5)


def test_poisson_is_the_sum_over_axes():
    line = 2 * np.eye(4) - np.eye(4, k=1) - np.eye(4, k=-1)
    eye = np.eye(4)
    assert np.array_equal(graph.poisson(4).toarray(), np.kron(line, eye) + np.kron(eye, line))
    cube = graph.poisson(4, 3).toarray()
    assert np.array_equal(np.diag(cube), np.full(64, 6))
    assert (cube != 0).sum() == 64 + 6 * 64 - 6 * 16


@pytest.mark.parametrize("module", [graph, video])
def test_definitions(module):
    assert module.BENCH.op == module.__name__.rpartition(".")[2]
    assert len({case.name for case in module.BENCH.cases}) == len(module.BENCH.cases)
    assert all(case.flops > 1e6 and case.bytes > 1e6 for case in module.BENCH.cases)
