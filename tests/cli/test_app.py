"""The program around the commands: help, exit codes, errors, pipes, the cost of starting."""

import json
import re
import shlex
import subprocess
import sys
import warnings

import pytest

from torchzoo import catalogue
from torchzoo.cli import app
from torchzoo.errors import TorchzooError, UnknownNameError, WeightsError

COMMANDS = list(app.COMMANDS)


def one_line(err):
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_help_lists_every_command_and_is_shown_without_arguments(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(re.search(rf"\b{name}\b", out) for name in COMMANDS)
    assert run("--help") == (0, out, "")
    assert run("-h")[0] == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_of_it(run, name):
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert f"torchzoo {name}" in out.partition("Example")[2]


@pytest.mark.parametrize("name", ["list", "search", "info", "cite", "doctor"])
def test_the_example_in_the_help_runs(run, name):
    _, out, _ = run(name, "--help")
    line = re.search(r"Example: torchzoo (.+?)\s*$", out, re.MULTILINE)[1]
    code, out, err = run(*shlex.split(line))
    assert code == 0
    assert out
    assert "error" not in err


def test_version(run):
    from torchzoo import __version__

    assert run("--version") == (0, f"torchzoo {__version__}\n", "")


def test_an_unknown_command_suggests_the_nearest(run):
    code, out, err = run("reprduce")
    assert (code, out) == (2, "")
    assert one_line(err) == "error: no command 'reprduce'; did you mean reproduce?\n"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["list", "--famly", "moe"], "--famly"),
        (["list", "--family"], "--family"),
        (["search"], "TEXT"),
        (["info"], "NAME"),
        (["info", "48", "69"], "69"),
        (["reproduce", "48", "--budget", "huge"], "huge"),
        (["reproduce", "48", "--seed", "-1"], "--seed"),
        (["reproduce", "48", "--seed", "x"], "--seed"),
        (["reproduce", "48", "--jobs", "0"], "--jobs"),
        (["reproduce", "48", "--device", "tpu"], "tpu"),
    ],
)
def test_wrong_options_are_a_line_that_names_them_and_exit_2(run, args, part):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert part in one_line(err)


@pytest.mark.parametrize("command", ["info", "cite", "reproduce"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GausianAdaptiveAttention", "did you mean GaussianAdaptiveAttention"),
        ("999", "no paper 999; numbers run from 1 to 171"),
        ("moe.TopKGat", "no paper or unit 'moe.TopKGat'; did you mean moe.TopKGate"),
        ("moe", "'moe' is a family; see torchzoo list --family moe"),
        ("", "no paper or unit ''"),
        ("[red]x[/]", "no paper or unit '[red]x[/]'"),
    ],
)
def test_unknown_names_are_a_line_with_suggestions_and_exit_2(run, command, name, message):
    code, out, err = run(command, name)
    assert (code, out) == (2, "")
    assert message in one_line(err)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UnknownNameError("no 'x'"), 2, "error: no 'x'"),
        (WeightsError("torn\n  file"), 1, "error: torn file"),
        (TorchzooError("no"), 1, "error: no"),
        (ModuleNotFoundError("…", name="sklearn"), 1, "error: sklearn is not installed; "),
        (OSError(28, "No space left on device"), 1, "error: the disk is full"),
        (ZeroDivisionError("by zero"), 1, "error: ZeroDivisionError: by zero (set TORCHZOO_DEBUG"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes_and_no_traceback(run, monkeypatch, error, code, line):
    def fails(_text):
        raise error

    monkeypatch.setattr("torchzoo.catalogue.search", fails)
    given, out, err = run("search", "x")
    assert (given, out) == (code, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("TORCHZOO_DEBUG", "1")
    with pytest.raises(UnknownNameError, match="no family 'x'"):
        run("list", "--family", "x")


def test_warnings_are_a_line_on_stderr(run, monkeypatch):
    def warns(_text):
        warnings.warn("slow today", stacklevel=1)
        return []

    monkeypatch.setattr("torchzoo.catalogue.search", warns)
    code, out, err = run("search", "x", "--json")
    assert (code, json.loads(out)) == (0, [])
    assert "warning: slow today\n" in err


def test_help_and_errors_do_not_import_torch():
    absent = next(paper.number for paper in catalogue.papers() if not paper.units)
    probe = (
        "import sys; from torchzoo.cli.app import main;"
        "codes = [main(a.split()) for a in ('--help', 'list --family x', 'info nothing',"
        f" 'info --help', 'cite {absent}', 'search gaussian', 'reproduce {absent}')];"
        "print(codes, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[0, 2, 2, 0, 0, 0, 2] False"


@pytest.mark.parametrize("command", ["search e", "list --family diffusion --json", "--help"])
def test_a_closed_pipe_is_quiet(command):
    line = f"{sys.executable} -m torchzoo.cli.app {command} | head -1 | wc -l"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("1", "")


def test_an_ascii_terminal_gets_replacements_rather_than_an_error():
    done = subprocess.run(
        [sys.executable, "-m", "torchzoo.cli.app", "info", "3"],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode("ascii").startswith("3  A Method on Searching")
