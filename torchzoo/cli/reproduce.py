"""`torchzoo reproduce`: run the experiments and judge the papers' claims."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from torchzoo import catalogue
from torchzoo.catalogue import Paper
from torchzoo.cli._names import check_family, resolve
from torchzoo.cli._output import (
    BAD_REQUEST,
    Json,
    fail,
    new_grid,
    new_table,
    outcome_text,
    print_json,
    stderr,
    stdout,
    verdict_text,
    working,
)
from torchzoo.cli._where import Device, check_folder, resolve_device
from torchzoo.errors import TorchzooError, UnknownNameError

if TYPE_CHECKING:
    from torchzoo.experiment import Result

_SMOKE = Text("         smoke shows that it runs; the verdict that counts is that of full", "dim")


class Budget(StrEnum):
    """How much is spent."""

    full = "full"
    smoke = "smoke"


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A paper's number, slug or title, or a unit.",
            show_default=False,
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Every built paper of a family.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every built paper.")] = False,
    budget: Annotated[
        Budget, typer.Option(help="full is what verdicts are recorded with; smoke takes seconds.")
    ] = Budget.full,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes CUDA where it is.")] = (
        Device.auto
    ),
    out: Annotated[Path, typer.Option(help="Folder for the results and plots.")] = Path(
        "torchzoo-results"
    ),
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            help="Seeds at once. Above 1 each runs in a process with one torch thread; times that "
            "an experiment measures are then those of a busy machine.",
        ),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Run a paper's experiment and judge its claim.

    The criteria, and the rule that makes a verdict of them, are fixed before the run.
    Ctrl-C keeps the finished seeds: the same command goes on after them.

    Example: [bold]torchzoo reproduce gaussian-adaptive --budget smoke[/bold]

    Example: [bold]torchzoo reproduce 146 --jobs 2[/bold]
    """
    chosen = _choose(name, family, every)
    _check_plot()
    check_folder(out)
    with working("importing torch"):
        target = resolve_device(device)
    results, failed = [], 0
    for paper in chosen:
        try:
            result = _run(paper, budget.value, seed, target, out, jobs)
        except Exception as error:
            if len(chosen) == 1:
                raise
            # The other papers do not wait for the one that broke.
            fail(f"paper {paper.number}: {type(error).__name__}: {error}", BAD_REQUEST)
            failed += 1
            continue
        results.append(result)
        if not as_json:
            stdout().print(_report(paper, result, out))
    if as_json:
        found = [result.to_json() for result in results]
        print_json(found[0] if name else found)
    elif len(chosen) > 1:
        stdout().print(_overview(chosen, results))
    if failed:
        raise typer.Exit(BAD_REQUEST)


def _choose(name: str | None, family: str | None, every: bool) -> list[Paper]:
    if sum((name is not None, family is not None, every)) != 1:
        raise typer.BadParameter("expected one of NAME, --family and --all")
    if name is not None:
        paper = resolve(name).paper
        if paper is None:
            raise UnknownNameError(f"{name} is an engine piece of the zoo, without a claim to test")
        if not paper.experiment:
            raise UnknownNameError(f"paper {paper.number} ({paper.title}) has no experiment yet")
        return [paper]
    if family is not None:
        check_family(family)
    chosen = [p for p in catalogue.papers() if p.experiment and family in (None, p.family)]
    if not chosen:
        raise TorchzooError(f"no paper of the family {family!r} has an experiment yet")
    return chosen


def _check_plot() -> None:
    if find_spec("matplotlib") is None:
        raise TorchzooError("the plot needs matplotlib: pip install torchzoo[plot]")


def _run(paper: Paper, budget: str, seed: int, device: str, out: Path, jobs: int) -> Result:
    from torchzoo import experiment

    with working(f"importing {paper.slug}"):
        loaded = experiment.load(paper)
    try:
        with _progress(paper.slug) as tick:
            return experiment.reproduce(
                loaded, budget=budget, seed=seed, device=device, out=out, jobs=jobs, progress=tick
            )
    except KeyboardInterrupt:
        stderr().print(f"{paper.slug}: the same command goes on after the finished seeds")
        raise


class _Remaining(ProgressColumn):
    """Time left, from how long the seeds of this run took."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["resumed"]
        if not done or task.elapsed is None or task.total is None:
            return Text("eta -:--", "cyan")
        each = task.fields["mark"] / done
        left = max(0.0, each * (task.total - task.completed) - (task.elapsed - task.fields["mark"]))
        return Text(f"eta {int(left) // 60}:{int(left) % 60:02d}", "cyan")


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    """Yield the experiment's progress call: a bar in a terminal, else a line a seed, on stderr."""
    console = stderr()
    bar = Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(20),
        TextColumn("seed {task.fields[seed]}/{task.total:.0f}"),
        _Remaining(),
        TextColumn(
            "{task.fields[line]}",
            style="dim",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        console=console,
        transient=True,
        expand=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(title, total=1, line="", seed=1, resumed=0, mark=0.0)
    seen = -1

    def tick(done: int, total: int, line: str) -> None:
        nonlocal seen
        if seen < 0 and done:
            console.print(f"{title}: goes on after {done} of {total} seeds that are finished")
            bar.update(task, resumed=done)
        elif done > max(seen, 0):
            bar.update(task, mark=bar.tasks[0].elapsed or 0.0)
            if not console.is_terminal:
                console.print(f"{title}: {done} of {total} seeds", soft_wrap=True)
        seen = done
        line = "drawing the plot" if done == total else line
        bar.update(task, completed=done, total=total, seed=min(done + 1, total), line=line)

    with bar:
        yield tick


def _report(paper: Paper, result: Result, out: Path) -> Group:
    """One run: claimed, measured, judged."""
    head = new_grid("dim")
    rows = {
        "claimed": result.claim["statement"],
        "figure": result.claim["figure"],
        "source": result.claim["source"],
        "setup": result.setup,
        "baseline": result.baseline,
    }
    for label, text in rows.items():
        head.add_row(label, Text(text, "bold" if label == "figure" else ""))

    figures = new_table()
    figures.add_column("measured")
    figures.add_column("mean", justify="right", no_wrap=True)
    figures.add_column("± std error", justify="right", no_wrap=True, style="dim")
    for measured in result.measured().values():
        figures.add_row(Text(measured.name), _figure(measured.mean), f"{measured.std_error:.2g}")

    judged = new_table()
    judged.add_column("", no_wrap=True)
    judged.add_column("criterion", ratio=3)
    judged.add_column("measured", ratio=2)
    for criterion in result.criteria:
        outcome = {True: "holds", False: "fails", None: "void"}[criterion["holds"]]
        judged.add_row(outcome_text(outcome), Text(criterion["text"]), Text(criterion["measured"]))

    seeds = f"{len(result.seeds)} seed" + "s" * (len(result.seeds) > 1)
    run = f"  {result.budget} budget, {seeds}, {result.seconds:.1f} s, {result.device}"
    unit = paper.experiment.rpartition(".")[2]
    return Group(
        Text(f"{paper.number}  {paper.title}", "bold"),
        "",
        head,
        "",
        figures,
        "",
        judged,
        "",
        Text("verdict  ", "dim").append(verdict_text(result.verdict)).append(run, "dim"),
        *([_SMOKE] if result.budget == "smoke" else []),
        Text("saved    ", "dim").append(f"{out / unit}.json, {out / unit}.png", "default"),
        "",
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _overview(chosen: list[Paper], results: list[Result]) -> Table:
    table = new_table()
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("paper")
    table.add_column("verdict", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    by_number = {result.paper: result for result in results}
    for paper in chosen:
        result = by_number.get(paper.number)
        verdict = verdict_text(result.verdict) if result else Text("did not finish", "red")
        seconds = f"{result.seconds:.1f}" if result else "–"
        table.add_row(str(paper.number), paper.title, verdict, seconds)
    return table
