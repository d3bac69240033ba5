"""One quick run from end to end, and what it wrote."""

import base64
import json
import re
from html import unescape

import pytest
import torch
from typer.testing import CliRunner

from torchzoo.cli import app, quickstart
from torchzoo.data.digits import digits
from torchzoo.errors import TorchzooError
from torchzoo.experiments.quickstart import figures, finetune, timing
from torchzoo.experiments.quickstart.figures import Value
from torchzoo.experiments.quickstart.training import score
from torchzoo.hub import from_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("quickstart")
    (out / "report.html").write_text("from an earlier run")
    assert app.main(["quickstart", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def page(folder):
    return unescape((folder / "report.html").read_text())


def test_it_leaves_the_report_and_the_model_and_nothing_else(folder):
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.json", "model"}


def test_every_figure_of_the_json_is_on_the_page(report, page):
    assert len(report["figures"]) >= 14
    for row in report["figures"]:
        for text in (row["what"], row["against"], *(row[k]["text"] for k in ("ours", "theirs"))):
            assert text in page
        assert row["result"]["text"] in page


def test_figures_are_those_of_the_runs(report):
    runs = report["fine_tuning"]
    assert set(runs) == {arm.key for arm in finetune.ARMS}
    finals = {key: [run["test_accuracy"][-1] for run in each] for key, each in runs.items()}
    first = report["figures"][0]
    zoo, scratch = finals["zoo_pretrained"], finals["zoo_scratch"]
    assert first["ours"]["number"] == pytest.approx(sum(zoo) / 2)
    assert first["result"]["number"] == pytest.approx(sum(zoo) / 2 - sum(scratch) / 2)
    point = report["moving_digits"]["points"][0]
    assert point["agreement"] == 1
    assert point["difference"] < 1e-4
    assert len(report["timings"]) == timing.CASES


def test_the_saved_model_is_the_one_that_was_judged(folder, report):
    data = digits(finetune.CLASSES)
    model = from_pretrained(folder / "model")
    reached = report["fine_tuning"]["zoo_pretrained"][0]["test_accuracy"][-1]
    assert score(model, data.test_x, data.test_y) == pytest.approx(reached, abs=1e-9)


def test_the_page_is_self_contained_and_each_picture_has_words(page):
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "<script" not in page
    pictures = re.findall(r'<img alt="([^"]{40,})" src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == 7
    assert all(base64.b64decode(data).lstrip().startswith(b"<?xml") for _, data in pictures)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--out", "/dev/null/here"], "can't write into /dev/null/here"),
        (["--seed", "-1"], "seed"),
        (["--seed", "many"], "seed"),
        (["--device", "tpu"], "device"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, line, capsys, monkeypatch):
    monkeypatch.setattr("torchzoo.experiments.quickstart.run.run", lambda *a, **k: 1 / 0)
    assert app.main(["quickstart", *arguments]) in (1, 2)
    message = capsys.readouterr().err.strip()
    assert line in message
    assert "\n" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_refused():
    with pytest.raises(TorchzooError, match="no CUDA device"):
        quickstart.resolve_device(quickstart.Device.cuda)


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None)
    with pytest.raises(TorchzooError, match=r"pip install torchzoo\[plot\]"):
        quickstart._check_packages()


def test_help_has_an_example():
    result = CliRunner().invoke(app.build(), ["quickstart", "--help"])
    assert result.exit_code == 0
    assert "torchzoo quickstart --out my-first-run" in result.output


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Value(0.8234, "%", 0.0123), "82.3 ± 1.2 %"),
        (Value(-0.0123, "points", 0.004), "-1.2 ± 0.4 points"),
        (Value(0.1, "points"), "+10.0 points"),
        (Value(-0.00001, "points"), "+0.0 points"),
        (Value(0.3, "skipped"), "30.0 % skipped"),
        (Value(322608.0, "MAC"), "322.6 kMAC"),
        (Value(1.234e-4, "s"), "123 µs"),
        (Value(0.01234, "s"), "12.3 ms"),
        (Value(2.0, "s"), "2.00 s"),
        (Value(1.2874e-05, "logit"), "1.3e-05 in logits"),
        (Value(0.6441, "x"), "0.64x"),
    ],
)
def test_values_read_well(value, text):
    assert value.text == text


def test_a_difference_within_its_error_counts_neither_way():
    tie = {"zoo_pretrained": [0.8, 0.9], "zoo_scratch": [0.6, 0.7],
           "transformer_pretrained": [0.9, 0.8], "transformer_scratch": [0.7, 0.8]}  # fmt: skip
    assert [row.better for row in figures.accuracy_rows(tie)] == [True, None, False]
    spread = timing.Spread
    rows = figures.timing_rows(
        [
            timing.Timing("a", "b", spread(1.0, 0.1), spread(2.0, 0.1), "cpu", 2),
            timing.Timing("a", "b", spread(2.0, 0.1), spread(1.0, 0.1), "cpu", 2),
            timing.Timing("a", "b", spread(1.0, 0.5), spread(1.4, 0.1), "cpu", 2),
        ]
    )
    assert [(row.better, row.result.text) for row in rows] == [
        (True, "2.00x"),
        (False, "0.50x"),
        (None, "1.40x"),
    ]
