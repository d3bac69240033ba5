"""What a model card says: the module, its paper, what was measured here, how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchzoo import catalogue, registry
from torchzoo._docstring import sections

LICENSE = "apache-2.0"

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ summary }}

{{ source }}

```python
import torchzoo

model = torchzoo.from_pretrained("folder or hub id")
```
{% for title, text in parts.items() %}
## {{ title }}

{{ text }}
{% endfor %}"""


def fields(cls: type, training: Mapping[str, Any]) -> dict[str, Any]:
    """What the template takes.

    Args:
        cls: The module's class.
        training: How it was trained: of `data`, `metric`, `seed` and `command` what is known.
    """
    text = sections(cls)
    source = text.get("Source", "")
    parts = {}
    number = next((card.paper for card in registry.registered() if card.cls is cls), None)
    if number is not None:
        paper = catalogue.find(str(number))
        parts["Paper"] = _paper(paper)
        source = source or paper.title
    if training:
        parts["Training"] = "\n".join(
            f"- {key}: {_plain(value)}" for key, value in training.items()
        )
    if source:
        parts["Citation"] = f"Cite the paper, {' '.join(source.split())}\nand torchzoo."
    parts["License"] = "Apache-2.0, as torchzoo; the data have licenses of their own."
    summary = text[""]
    return {
        "name": cls.__name__,
        "summary": summary,
        "source": f"Source: {text['Source']}" if "Source" in text else "",
        "parts": parts,
    }


def _paper(paper: catalogue.Paper) -> str:
    lines = [f"{paper.title}.", ""]
    if paper.claim:
        lines.append(f"- claimed: {paper.claim}")
    result = catalogue.recorded_result(paper)
    verdict = result["verdict"] if result else "not measured"
    lines.append(f"- measured by torchzoo: {verdict}")
    if result:
        lines += [
            f"  - {_outcome(row)}: {row['text']} ({row['measured']})" for row in result["criteria"]
        ]
        lines.append(f"- again: `torchzoo reproduce {paper.number}`")
    return "\n".join(lines)


def _outcome(criterion: Mapping[str, Any]) -> str:
    return {True: "holds", False: "fails", None: "void"}[criterion["holds"]]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {figure}" for key, figure in value.items())
    return f"`{value}`" if isinstance(value, str) and value.startswith("python ") else str(value)
