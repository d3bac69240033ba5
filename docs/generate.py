"""Writes the API pages and the gallery from the catalogue, the registry and recorded results."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

from torchzoo import catalogue, experiment
from torchzoo.catalogue import Paper
from torchzoo.registry import _public_names, cards

CORE = {
    "torchzoo.catalogue": "Catalogue",
    "torchzoo.registry": "Registry",
    "torchzoo.hub": "Saving, loading, sharing",
    "torchzoo.experiment": "Experiments",
    "torchzoo.trainer": "Trainer",
    "torchzoo.surgery": "Surgery",
    "torchzoo.swaps": "Swaps",
    "torchzoo.finetuning": "Fine-tuning",
    "torchzoo.testing": "The module contract",
    "torchzoo.ops": "Operators",
}
PACKAGES = ("torchzoo.ops", "torchzoo.testing", "torchzoo.swaps", "torchzoo.finetuning")
MARK = {"holds": "✓ holds", "refuted": "✗ refuted", "untested": "untested"}
OUTCOME = {True: "✓ holds", False: "✗ fails", None: "void"}


def write_all(folder: Path) -> None:
    """Write every generated page into `folder`, replacing what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    families = sorted(set(_public_names().values()))
    for family in families:
        (folder / f"api-{family}.md").write_text(family_page(family), encoding="utf-8")
    for module, title in CORE.items():
        name = module.rsplit(".", 1)[1]
        (folder / f"core-{name}.md").write_text(
            f"# {title}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n"
            "   :imported-members:\n   :show-inheritance:\n```\n"
            if module in PACKAGES
            else f"# {title}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```\n",
            encoding="utf-8",
        )
    built = [paper for paper in catalogue.papers() if paper.built]
    for paper in built:
        (folder / f"paper-{paper.number}.md").write_text(
            paper_page(paper, folder), encoding="utf-8"
        )
    (folder / "api.md").write_text(
        "# API by family\n\n"
        + toctree([f"api-{family}" for family in families])
        + "\n## Core\n\n"
        + toctree([f"core-{module.rsplit('.', 1)[1]}" for module in CORE]),
        encoding="utf-8",
    )
    (folder / "gallery.md").write_text(gallery_page(built), encoding="utf-8")


def toctree(pages: list[str]) -> str:
    return "```{toctree}\n:maxdepth: 1\n\n" + "\n".join(pages) + "\n```\n"


def cell(text: str) -> str:
    """Text that can stand in a Markdown table."""
    return text.replace("|", "\\|")


def family_page(family: str) -> str:
    """Summary, capability table and reference of one family."""
    module = import_module(f"torchzoo.{family}")
    lines = [f"# torchzoo.{family}", "", (module.__doc__ or "").strip(), ""]
    lines += ["## Modules", "", "| module | paper | declared exemptions |", "|---|---|---|"]
    for card in cards(family):
        paper = f"[{card.paper}](paper-{card.paper}.md)" if card.paper else "engine"
        exempt = "; ".join(f"{what}: {why}" for what, why in card.exempt.items()) or "none"
        lines.append(f"| `{card.name}` | {paper} | {exempt} |")
    lines += ["", "## Reference", ""]
    for name in module.__all__:
        kind = "autoclass" if isinstance(getattr(module, name), type) else "autofunction"
        members = "   :members:\n   :show-inheritance:\n" if kind == "autoclass" else ""
        home = getattr(module, name).__module__
        if not home.startswith(module.__name__):  # another package's, and described there
            continue
        lines.append(f"```{{eval-rst}}\n.. {kind}:: {home}.{name}\n{members}```\n")
    return "\n".join(lines)


def gallery_page(built: list[Paper]) -> str:
    papers = catalogue.papers()
    lines = [
        "# Gallery",
        "",
        f"{len(built)} of {len(papers)} papers are built. Each page shows the claim, what was "
        "measured, and which properties are tested.",
        "",
        "| paper | title | verdict |",
        "|---|---|---|",
    ]
    for paper in built:
        result = catalogue.recorded_result(paper)
        verdict = result["verdict"] if result else "not yet run"
        lines.append(f"| {paper.number} | [{paper.title}](paper-{paper.number}.md) | {verdict} |")
    lines += ["", toctree([f"paper-{paper.number}" for paper in built]), "## Families", ""]
    lines += ["| family | built | papers |", "|---|---|---|"]
    for family in catalogue.families():
        mine = [paper for paper in papers if paper.family == family]
        done = sum(paper in built for paper in mine)
        lines.append(f"| {family} | {done} | {len(mine)} |")
    return "\n".join(lines) + "\n"


def paper_page(paper: Paper, folder: Path) -> str:
    """One paper: summary, units, claim against measured with the plot, tested properties."""
    lines = [f"# {paper.title}", "", paper.summary, ""]
    lines += [f"- paper {paper.number}, family [{paper.family}](api-{paper.family}.md)"]
    lines += [f"- units: {', '.join(f'`{name}`' for name in paper.unit_names)}"]
    lines += [f"- run it: `torchzoo reproduce {paper.number}`", ""]
    result = catalogue.recorded_result(paper)
    lines += ["## Claim and verdict", "", f"Claim: {paper.claim}", ""]
    lines += (
        result_section(paper, result, folder) if result else ["Not yet run at full budget.", ""]
    )
    lines += ["## Tested properties", "", "| property | tolerance | status |", "|---|---|---|"]
    for claim in catalogue.claims(paper.number):
        tolerance = claim["tolerance"] if claim["tolerance"] is not None else "exact"
        lines.append(f"| {cell(claim['statement'])} | {tolerance} | {MARK[claim['status']]} |")
    return "\n".join(lines) + "\n"


def result_section(paper: Paper, result: dict, folder: Path) -> list[str]:
    unit = experiment.load(paper)
    measured = {
        m["name"]: experiment.Measurement(m["name"], tuple(m["values"]))
        for m in result["measurements"]
    }
    picture = folder / f"paper-{paper.number}.png"
    experiment.save_plot(unit, measured, picture)
    lines = [f"**Verdict: {result['verdict']}.** {result['setup']}", ""]
    lines += [f"Baseline: {result['baseline']}", "", f"![measured]({picture.name})", ""]
    lines += ["| criterion, fixed before the run | measured | outcome |", "|---|---|---|"]
    for row in result["criteria"]:
        outcome = OUTCOME[row["holds"]]
        lines.append(f"| {cell(row['text'])} | {cell(row['measured'])} | {outcome} |")
    lines += ["", "| figure | mean ± s.e. |", "|---|---|"]
    lines += [f"| {cell(name)} | {value} |" for name, value in measured.items()]
    where = f"{result['device']}, torch {result['versions']['torch']}, {result['seconds']:.0f} s"
    return [*lines, "", f"Seeds {result['seeds'][0]} to {result['seeds'][-1]}; {where}.", ""]
