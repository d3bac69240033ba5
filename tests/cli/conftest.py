"""What the command line's tests share: running it in process, papers with tiny experiments."""

import sys
import textwrap

import pytest

from torchzoo import catalogue
from torchzoo.cli.app import main

COIN = '''
    """A coin that lands on heads more often than a fair one."""
    import time
    from pathlib import Path

    from torchzoo.experiment import Claim, Criterion, Experiment


    def trial(context):
        context.progress("tossing")
        log = Path(__file__).with_name("log.txt")
        log.write_text((log.read_text() if log.exists() else "") + f"{context.seed} ")
        time.sleep(context.options["sleep"])
        stop = Path(__file__).with_name("stop")
        if stop.exists() and context.seed == 5:
            raise KeyboardInterrupt
        return {"coin": 0.6 + 0.01 * context.seed, "fair": 0.5}


    def gain(m):
        return (m["coin"].mean > m["fair"].mean, f"{m['coin'].mean:.3f} against 0.5")


    EXPERIMENT = Experiment(
        paper=901,
        claim=Claim("The coin beats a fair one", "+20 % heads", "Table 1"),
        setup="10 tosses",
        baseline="a fair coin",
        criteria=[
            Criterion("more heads than the fair coin", gain),
            Criterion("at least 0.9 heads", lambda m: (m["coin"].mean > 0.9, "too few")),
            Criterion("silver stays silver", lambda m: (None, "no silver coin")),
        ],
        budgets={"full": {"seeds": 3, "sleep": 0}, "smoke": {"seeds": 1, "sleep": 0}},
        trial=trial,
        plot=lambda m, figure: figure.subplots().bar(list(m), [v.mean for v in m.values()]),
    )
'''

BROKEN = COIN.replace("return {", "raise RuntimeError('the mint is closed')\n        return {")


@pytest.fixture
def run(capsys):
    """Call as `run("list", "--json")`; gives exit code, stdout and stderr."""

    def call(*args):
        code = main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A catalogue of three made-up papers; gives the folder of the experiments that two have."""
    folder = tmp_path / "site" / "fakezoo" / "coins"
    folder.mkdir(parents=True)
    (folder / "coin.py").write_text(textwrap.dedent(COIN))
    (folder / "broken.py").write_text(textwrap.dedent(BROKEN).replace("901", "902"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    rows = (
        catalogue.Paper(901, "Heads: A Study", "moe", "s", "c", (), "fakezoo.coins.coin"),
        catalogue.Paper(902, "Tails", "moe", "s", "c", (), "fakezoo.coins.broken"),
        catalogue.Paper(903, "Edges & 100% of {them}", "gp", "s", "c"),
    )
    monkeypatch.setattr(catalogue, "papers", lambda: rows)
    yield folder
    for name in [name for name in sys.modules if name.startswith("fakezoo")]:
        del sys.modules[name]
