"""Saving and loading: round trips, and every way in which a folder can be wrong."""

import copy
import json
import os
import pickle
import shutil
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from torch import nn

import torchzoo
from torchzoo import _weights, hub, registry
from torchzoo.errors import WeightsError
from torchzoo.hub import ZooModel, from_pretrained, manifest, ship


class Part(ZooModel):
    """A linear map.

    Source:
        Nobody, Nothing in Particular, 1900.
    """

    def __init__(self, dim, *, act=torch.tanh, limits=(0, 1), device=None, dtype=None):
        super().__init__()
        self.act, self.limits = act, limits
        self.weight = nn.Parameter(torch.randn(dim, dim, device=device, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.long, device=device))

    def forward(self, x):
        return self.act(x @ self.weight)


class Whole(ZooModel):
    """Parts in a row, the last of which may be tied to the first."""

    def __init__(self, first, *others, tied=False, **extra):
        super().__init__()
        self.parts = nn.ModuleList([first, *others])
        self.extra = extra
        if tied:
            self.parts[-1].weight = first.weight

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Part and Whole are registered, and the shipped weights are none."""
    registry.cards()
    monkeypatch.setattr(registry, "_cards", dict(registry._cards))
    for cls in (Part, Whole):
        torchzoo.register(example=lambda: None)(cls)


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """An empty folder of shipped weights."""
    monkeypatch.setattr(_weights, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def saved(tmp_path):
    """A Part of dimension 3 and its folder."""
    part = Part(3)
    return part, part.save_pretrained(tmp_path / "part")


def same(one, two):
    mine, theirs = one.state_dict(), two.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in mine
    )


def test_folder_has_config_weights_and_card(saved):
    _part, folder = saved
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "format": 1,
        "class": f"{__name__}:Part",
        "config": {"dim": 3, "limits": {"tuple": [0, 1]}, "dtype": None},
    }
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    card = (folder / "README.md").read_text()
    for text in ("# Part", "A linear map.", "Nobody, Nothing in Particular", "from_pretrained"):
        assert text in card


def test_round_trip_in_all_ways(saved):
    part, folder = saved
    for load in (from_pretrained, torchzoo.from_pretrained, Part.from_pretrained):
        for path in (folder, str(folder)):
            model = load(path)
            assert type(model) is Part
            assert same(model, part)
            assert model.limits == (0, 1)
            assert not model.training


def test_modules_nest_and_are_rebuilt_with_their_own_arguments(tmp_path):
    whole = Whole(Part(3), Part(3, limits=[1.5], dtype=torch.float64), note={"a": [1, None, "x"]})
    config = hub._config.spec(whole)["config"]
    assert config["first"]["class"] == f"{__name__}:Part"
    assert config["others"]["tuple"][0]["config"]["dtype"] == "float64"
    again = Whole.from_pretrained(whole.save_pretrained(tmp_path / "whole"))
    assert same(again, whole)
    assert again.parts[1].limits == [1.5]
    assert again.extra == {"note": {"a": [1, None, "x"]}}


def test_tied_tensors_stay_tied(tmp_path):
    whole = Whole(Part(3), Part(3), tied=True)
    folder = whole.save_pretrained(tmp_path / "tied")
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert sum(key.endswith("weight") for key in stored) == 1
    again = Whole.from_pretrained(folder)
    assert again.parts[0].weight is again.parts[1].weight
    assert same(again, whole)
    rewrite(folder, lambda tensors: tensors.pop(next(k for k in tensors if k.endswith("weight"))))
    with pytest.raises(WeightsError, match=r"missing: parts\.0\.weight, parts\.1\.weight"):
        from_pretrained(folder)


class Limits(NamedTuple):
    low: float
    high: float


@pytest.mark.parametrize(
    "value",
    [
        0.1,
        True,
        None,
        "x",
        (1, (2, 3)),
        [(), []],
        {"tuple": [1]},
        {"class": "a", "config": {}},
        float("inf"),
        -float("inf"),
        torch.Size([2, 3]),
    ],
)
def test_plain_values_come_back_as_they_were(value, tmp_path):
    part = Part(2, limits=value)
    again = Part.from_pretrained(part.save_pretrained(tmp_path / "part"))
    assert again.limits == value
    assert type(again.limits) is (tuple if isinstance(value, torch.Size) else type(value))


def test_named_tuples_of_the_zoo_come_back_and_others_are_refused(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=r"limits: .*named tuple .*test_hub:Limits"):
        Part(2, limits=Limits(0.0, 1.0)).save_pretrained(tmp_path / "part")
    monkeypatch.setattr(Limits, "__module__", "torchzoo.errors")
    monkeypatch.setattr("torchzoo.errors.Limits", Limits, raising=False)
    part = Part(2, limits=Limits(0.0, 1.0))
    again = Part.from_pretrained(part.save_pretrained(tmp_path / "part"))
    assert type(again.limits) is Limits
    assert again.limits == part.limits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Part(2, act=lambda x: x), r"act: .* got function .*lambda"),
        (lambda: Part(2, act=torch.sin), "act: .* got builtin_function_or_method .*sin"),
        (lambda: Part(2, limits=torch.zeros(4)), r"limits: .* got a tensor of shape \(4,\)"),
        (lambda: Part(2, limits=[0, {1, 2}]), r"limits\[1\]: .* got set"),
        (lambda: Part(2, limits={1: 2}), "limits: .* got dict"),
        (lambda: Part(2, limits=torch.float32), "limits: .* got dtype"),
        (lambda: Whole(nn.Linear(2, 2)), "first: .* got Linear"),
        (lambda: Whole(Part(2), Part(2, act=abs)), r"others\[0\]\.act: .* got builtin"),
    ],
)
def test_what_json_cannot_hold_is_an_error_at_saving_only(make, message, tmp_path):
    model = make()
    with pytest.raises(WeightsError, match=message):
        model.save_pretrained(tmp_path / "part")
    assert os.listdir(tmp_path) == []


def test_model_changed_after_building_is_not_saved(tmp_path):
    whole = Whole(Part(3))
    whole.parts.append(Part(3))
    message = r"Whole was changed after it was built: left over: parts\.1\.count, parts\.1\.weight"
    with pytest.raises(WeightsError, match=message):
        whole.save_pretrained(tmp_path / "whole")


def test_note_is_copied_and_never_shared():
    limits = {"a": [1]}
    part = Part(2, limits=limits)
    whole, other = Whole(part), Whole(part)
    limits["a"].append(2)
    whole._zoo_config["first"]["config"]["limits"]["dict"]["a"].append(3)
    for module in (part, copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert module._zoo_config["limits"] == {"dict": {"a": [1]}}
    assert other._zoo_config["first"]["config"]["limits"] == {"dict": {"a": [1]}}


def test_wrong_arguments_raise_the_constructors_error():
    with pytest.raises(TypeError, match="dim"):
        Part()
    with pytest.raises(TypeError, match="width"):
        Part(2, width=3)


def test_dtype_is_the_saved_one_unless_overridden(saved, tmp_path):
    part, _ = saved
    folder = copy.deepcopy(part).double().save_pretrained(tmp_path / "double")
    assert from_pretrained(folder).weight.dtype == torch.float64
    again = from_pretrained(folder, dtype=torch.float32)
    assert again.weight.dtype == torch.float32
    assert torch.equal(again.weight, part.weight)


def test_overrides_and_device(saved):
    part, folder = saved
    model = from_pretrained(folder, limits=[5], device="cpu")
    assert model.limits == [5]
    assert same(model, part)
    with torch.device("meta"):
        assert from_pretrained(folder, device="cpu").weight.device.type == "cpu"
    with pytest.raises(WeightsError, match=r"can't be built from this config: .*width"):
        from_pretrained(folder, width=3)
    with pytest.raises(WeightsError, match=r"weight is float32 \(3, 3\), the model has .*\(4, 4\)"):
        from_pretrained(folder, dim=4)


def test_class_must_fit(saved):
    with pytest.raises(WeightsError, match="holds a Part, not a Whole"):
        Whole.from_pretrained(saved[1])


def test_saving_over_a_model_replaces_it_and_keeps_other_files(saved):
    _, folder = saved
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("mine too")
    other = Part(4)
    assert other.save_pretrained(folder) == folder
    assert same(from_pretrained(folder), other)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "README.md").read_text() == "mine too"
    assert os.listdir(folder.parent) == [folder.name]


def test_interrupted_saving_leaves_no_mixture(saved, monkeypatch):
    part, folder = saved

    def stop(*args):
        raise OSError("disk full")

    monkeypatch.setattr(hub, "save_model", stop)
    with pytest.raises(WeightsError, match=r"can't write .*disk full"):
        Part(4).save_pretrained(folder)
    assert same(from_pretrained(folder), part)
    with pytest.raises(WeightsError):
        Part(4).save_pretrained(folder.parent / "new")
    assert os.listdir(folder.parent) == [folder.name]
    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.replace", stop)
    with pytest.raises(WeightsError):
        Part(4).save_pretrained(folder)
    with pytest.raises(WeightsError, match=r"can't read .*config.json"):
        Part.from_pretrained(folder)


def rewrite(folder, change):
    """Change the stored tensors."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight"), "doesn't fit Part: missing: weight$"),
        (lambda t: t.update(more=torch.zeros(1)), "doesn't fit Part: left over: more$"),
        (
            lambda t: t.update({f"k{i}": torch.zeros(1) for i in range(9)}),
            "left over: k0, k1, k2, k3, k4 and 4 more$",
        ),
        (
            lambda t: t.update(weight=torch.zeros(3, 2)),
            r"weight is float32 \(3, 2\), the model has float32 \(3, 3\)$",
        ),
        (
            lambda t: t.update(count=torch.zeros(())),
            r"count is float32 \(\), the model has int64 \(\)$",
        ),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    _, folder = saved
    rewrite(folder, change)
    with pytest.raises(WeightsError, match=message):
        from_pretrained(folder)


def test_not_strict_warns_about_keys_but_never_bends_shapes(saved):
    part, folder = saved

    def change(tensors):
        del tensors["count"]
        tensors["more"] = torch.zeros(1)

    rewrite(folder, change)
    with pytest.warns(UserWarning, match="missing: count; left over: more"):
        model = from_pretrained(folder, strict=False)
    assert torch.equal(model.weight, part.weight)
    rewrite(folder, lambda tensors: tensors.update(weight=torch.zeros(2)))
    with pytest.raises(WeightsError, match="wrong shape"):
        from_pretrained(folder, strict=False)


def damage(how):
    def apply(path):
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-5], "empty": b"", "noise": b"\xff" * len(data)}[how])

    return apply


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["cut", "empty", "noise"])
def test_damaged_files(saved, file, how):
    _, folder = saved
    damage(how)(folder / file)
    with pytest.raises(WeightsError, match=file) as raised:
        from_pretrained(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_files(saved, file):
    _, folder = saved
    (folder / file).unlink()
    with pytest.raises(WeightsError, match=file):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "not a config of format 1"),
        ({"config": []}, "not a config of format 1"),
        ({"class": "os:system"}, "'os:system' is neither torchzoo's nor registered"),
        ({"class": "torchzoo.nothing:Part"}, "can't be imported"),
        ({"class": "torchzoo.files:write_json"}, "is not a ZooModel class"),
        ({"class": "torchzoo.hub:Path"}, "is not a ZooModel class"),
        ({"class": "torchzoo.hub:nn.Linear"}, "neither torchzoo's nor registered"),
        ({"config": {"dim": 3, "width": 1}}, "has no argument 'width'"),
        ({"config": {}}, "can't be built from this config: .*dim"),
        ({"config": {"dim": 3, "dtype": "float33"}}, "dtype: no dtype 'float33'"),
        ({"config": {"dim": 3, "dtype": "nn"}}, "dtype: no dtype 'nn'"),
        ({"config": {"dim": 3, "limits": {"what": 1}}}, "unknown object"),
        (
            {
                "config": {
                    "dim": 3,
                    "limits": {"namedtuple": "os:terminal_size", "fields": [[1, 2]]},
                }
            },
            "neither torchzoo's nor registered",
        ),
    ],
)
def test_configs_that_are_refused(saved, change, message):
    _, folder = saved
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=message):
        from_pretrained(folder)


def test_config_cannot_import_a_module_from_elsewhere(saved, monkeypatch, tmp_path):
    """Even a ZooModel is out of bounds if its module was never imported by the user."""
    _, folder = saved
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = folder / "config.json"
    path.write_text(path.read_text().replace(f"{__name__}:Part", "trap:Part"))
    with pytest.raises(WeightsError, match="neither torchzoo's nor registered"):
        from_pretrained(folder)


def test_class_that_loads_need_not_be_registered(saved, monkeypatch):
    part, folder = saved
    monkeypatch.setattr(registry, "_cards", {})
    with pytest.raises(WeightsError, match="neither torchzoo's nor registered"):
        from_pretrained(folder)
    assert same(Part.from_pretrained(folder), part)


RECIPE = {"data": "digits", "metric": {"accuracy": 0.9}, "seed": 0, "command": "torchzoo train"}


def test_shipped_weights(weights):
    one, two = Part(3), Part(2)
    assert manifest() == {}
    ship("part-3", one, **RECIPE)
    folder = ship("part-2", two, **RECIPE)
    assert folder == weights / "part-2"
    assert list(manifest()) == ["part-2", "part-3"]
    entry = manifest()["part-3"]
    digest = entry.pop("sha256")
    assert digest == _weights.sha256(weights / "part-3" / "model.safetensors")
    assert entry == {
        "file": "part-3/model.safetensors",
        "class": f"{__name__}:Part",
        "parameters": 9,
        **RECIPE,
    }
    assert same(from_pretrained("part-3"), one)
    ship("part-3", two, **RECIPE)
    assert same(from_pretrained("part-3"), two)


def test_shipped_weights_are_checked(weights):
    ship("part", Part(3), **RECIPE)
    path = weights / "part" / "model.safetensors"
    expected = _weights.sha256(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=f"is {_weights.sha256(path)}, expected {expected}"):
        from_pretrained("part")
    shutil.rmtree(weights / "part")
    with pytest.raises(WeightsError, match="is missing from this installation"):
        from_pretrained("part")


def test_shipping_needs_a_plain_name(weights):
    for name in ("", "../up", "A b", "a/b"):
        with pytest.raises(ValueError, match="name: expected lower-case"):
            ship(name, Part(2), **RECIPE)
    assert not weights.exists()


def test_unknown_names(weights):
    ship("part-3", Part(3), **RECIPE)
    with pytest.raises(WeightsError, match=r"no weights 'prt-3': .* did you mean part-3\?"):
        from_pretrained("prt-3")


@pytest.mark.parametrize("name", list(manifest()))
def test_what_the_package_ships_loads(name):
    model = from_pretrained(name)
    entry = manifest()[name]
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]
    assert hub._config.class_path(type(model)) == entry["class"]


def test_hub_download(saved, monkeypatch):
    part, folder = saved
    calls = []

    def download(repo, **options):
        calls.append((repo, options))
        return str(folder)

    monkeypatch.setattr(_weights, "snapshot_download", download)
    assert same(from_pretrained("owner/part", revision="v1", token="secret"), part)
    files = ["config.json", "model.safetensors"]
    assert calls == [("owner/part", {"revision": "v1", "token": "secret", "allow_patterns": files})]


def test_hub_failure_is_one_line(monkeypatch):
    def download(repo, **options):
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setattr(_weights, "snapshot_download", download)
    with pytest.raises(WeightsError) as raised:
        from_pretrained("owner/part")
    assert str(raised.value) == "can't download 'owner/part' from the hub: no route to host"


def test_push_to_hub_uploads_what_save_pretrained_writes(saved, monkeypatch):
    part, _ = saved
    uploads = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **options):
            uploads[repo_id] = from_pretrained(folder_path)
            return "url"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert part.push_to_hub("owner/part") == "url"
    assert same(uploads["owner/part"], part)


def test_attribute_called_module_is_not_taken_for_the_model(tmp_path):
    class Wrapper(ZooModel):
        def __init__(self, module):
            super().__init__()
            self.module = module

    wrapper = Wrapper(Part(2))
    again = Wrapper.from_pretrained(wrapper.save_pretrained(tmp_path / "wrapper"))
    assert same(again, wrapper)
