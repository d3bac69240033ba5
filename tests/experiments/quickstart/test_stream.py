import pytest
import torch

from torchzoo.data.digits import digits
from torchzoo.data.streams import moving_digits
from torchzoo.experiments.quickstart import temporal
from torchzoo.experiments.quickstart.stream import StreamingClassifier, run_stream


def films(count=2, frames=5, **options):
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return moving_digits(images, frames=frames, seed=3, **options)


def dense(model, film):
    with torch.no_grad():
        return torch.stack([model(frame) for frame in film.unbind(1)], 1)


def test_without_a_quantum_a_film_gives_the_dense_model_up_to_rounding(small):
    film = films()
    single = run_stream(StreamingClassifier(small), film).logits
    torch.testing.assert_close(single, dense(small, film), atol=1e-5, rtol=0)
    double = run_stream(StreamingClassifier(small.double()), film.double()).logits
    torch.testing.assert_close(double, dense(small, film.double()), atol=1e-12, rtol=0)


def test_counted_work_equals_a_count_input_by_input(small):
    film = films(noise=0.01)
    stream = StreamingClassifier(small)
    stream.quantise(1 / 8, stream.calibrate(film))
    found = run_stream(stream, film)
    state = stream.init_state(len(film))
    for t, frame in enumerate(film.unbind(1)):
        _, after = stream.step(frame, state)
        done = 0
        for name, layer in stream.linears.items():
            for old, new in zip(
                state[name][0].flatten().tolist(), after[name][0].flatten().tolist(), strict=True
            ):
                done += layer.out_features if old != new else 0
        assert found.macs[t] == done
        state = after
    assert 0 < sum(found.macs) < sum(found.dense_macs)
    assert found.skipped == pytest.approx(1 - sum(found.macs) / sum(found.dense_macs))
    assert found.skipped_by_frame[1] == 1 - found.macs[1] / found.dense_macs[1]


def test_dense_work_is_that_of_the_experts_in_use(small):
    film = films(frames=3)
    found = run_stream(StreamingClassifier(small), film)
    for t, frame in enumerate(film.unbind(1)):
        _, routings = small(frame, return_routing=True)
        tokens = 2 * 16
        expected = tokens * 9 * 8 + 2 * (16 * 8 * 3)  # embedding and head
        for routing in routings:
            expected += tokens * 8 * 3 + int(routing.mask.sum()) * (8 * 5 + 5 * 8)
        assert found.dense_macs[t] == expected


def test_a_still_film_costs_nothing_after_its_first_frame(small):
    found = run_stream(StreamingClassifier(small), films(noise=0.0, hold=9))
    assert found.macs[0] > 0
    assert found.macs[1:] == [0, 0, 0, 0]


def test_quanta_are_shares_of_each_layers_root_mean_square(small):
    film = films(frames=1)
    stream = StreamingClassifier(small)
    scales = stream.calibrate(film)
    patches = small.embedding.patches(film[:, 0])
    patches = patches[patches.any(-1)]
    assert scales["embed"] == pytest.approx(float(patches.square().mean().sqrt()), rel=1e-6)
    stream.quantise(1 / 4, scales)
    _, state = stream.step(film[:, 0], stream.init_state(2))
    quantum = scales["embed"] / 4
    levels = state["embed"][0] / quantum
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert (state["embed"][0] - small.embedding.patches(film[:, 0])).abs().max() <= quantum / 2


def test_a_step_leaves_the_given_state_alone(small):
    stream = StreamingClassifier(small)
    film = films()
    _, state = stream.step(film[:, 0], stream.init_state(2))
    kept = {name: tuple(part.clone() for part in parts) for name, parts in state.items()}
    stream.step(film[:, 1], state)
    for name, parts in state.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, kept[name], strict=True))


def test_an_unused_expert_waits_and_catches_up(small):
    """A token that leaves an expert and comes back gives what the dense model gives."""
    generator = torch.Generator().manual_seed(0)
    film = torch.rand(1, 8, 1, 12, 12, generator=generator)
    used = []
    for frame in film.unbind(1):
        used.append(small(frame, return_routing=True)[1][0].mask)
    used = torch.stack(used).int()
    assert (used.diff(dim=0) == 1).any()
    assert (used.diff(dim=0) == -1).any()
    stream = StreamingClassifier(small)
    state = stream.init_state(1)
    for t, frame in enumerate(film.unbind(1)):
        _, after = stream.step(frame, state)
        for e in range(3):
            idle = used[t, :, e] == 0
            for part in ("in", "out"):
                for old, new in zip(state[f"{part}0_{e}"], after[f"{part}0_{e}"], strict=True):
                    assert torch.equal(old[0, idle], new[0, idle])
        state = after
    found = run_stream(stream, film)
    torch.testing.assert_close(found.logits, dense(small, film), atol=1e-5, rtol=0)


def test_the_sweep_chooses_on_training_films_and_reports_test_films(small):
    data = digits((5, 6, 7))
    calls = []
    steps = (None, 1 / 16, 4.0)
    found = temporal.measure(
        small, data, steps=steps, films=3, frames=4, seed=0, on_frame=lambda: calls.append(1)
    )
    assert len(calls) == 2 * 4 * 3
    assert [point.step for point in found.points] == list(steps)
    assert found.points[0].difference < 1e-4
    assert found.points[0].agreement == 1
    skipped = [point.skipped for point in found.points]
    assert skipped == sorted(skipped)
    film = moving_digits(data.test_x[:3], frames=4, hold=2, noise=0.02, seed=1)
    assert torch.equal(found.film, film[0, :, 0])
    hits = dense(small, film).argmax(-1) == data.test_y[:3, None]
    assert found.dense_accuracy == pytest.approx(hits.double().mean().item())


def test_the_chosen_step_is_that_of_the_training_films(small):
    """With black test images, on which every step agrees, so that the sides choose differently."""
    data = digits((5, 6, 7))
    data = data._replace(test_x=torch.zeros_like(data.test_x))
    steps = (None, 1 / 16, 1 / 2, 2.0)
    found = temporal.measure(small, data, steps=steps, films=6, frames=6, seed=0)
    stream = StreamingClassifier(small)
    film = moving_digits(data.train_x[:6], frames=6, hold=2, noise=0.02, seed=0)
    scales, kept = stream.calibrate(film), []
    for index, step in enumerate(steps):
        stream.quantise(step, scales)
        same = run_stream(stream, film).logits.argmax(-1) == dense(small, film).argmax(-1)
        kept += [index] if same.double().mean() >= 0.99 else []
    assert found.chosen == kept[-1] < 3
    assert found.points[3].agreement == 1


def test_an_expert_that_calibration_never_used_stays_exact(small):
    with torch.no_grad():
        gate = small.gates[0]
        gate.weight.copy_(gate.weight[:1].expand_as(gate.weight))
        gate.weight[2] = 0.0
        small.blocks[0].norm2.bias.copy_(100 * gate.weight[0])  # experts 0 and 1 win every token
    stream = StreamingClassifier(small)
    scales = stream.calibrate(films())
    assert {"in0_2", "out0_2"}.isdisjoint(scales)
    assert "in0_0" in scales
    stream.quantise(1 / 8, scales)
    assert stream.linears["in0_2"].quantum is None
    assert stream.linears["in0_0"].quantum == pytest.approx(scales["in0_0"] / 8)
    assert torch.isfinite(run_stream(stream, films()).logits).all()
