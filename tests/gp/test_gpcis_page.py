"""The page of clicks: a browser's logits are the head's."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from torchzoo.gp import GPCISHead
from torchzoo.gp.gpcis_page import export_html, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HEIGHT, WIDTH = 9, 12
CLICKS = [(2, 3, 1), (7, 8, -1), (0, 11, 1), (8, 0, -1)]  # row, column, sign


@pytest.fixture(scope="module")
def picture():
    torch.manual_seed(0)
    head = GPCISHead(5, num_basis=16, hidden=8)
    head.log_precision.data += torch.randn(5) / 3
    head.raw_weight.data += 0.7
    photo = torch.rand(3, HEIGHT, WIDTH)
    return head.eval(), torch.randn(5, HEIGHT, WIDTH), (photo - 0.5) / 0.25, photo


def run(text, script, folder):
    """What a browser writes into the page's last element after it ran a script."""
    code = f"""const app = start();
    {script}
    const told = document.createElement("pre");
    told.id = "told";
    const note = document.querySelector("output").textContent;
    told.textContent = JSON.stringify([Array.from(app.logits()), note]);
    document.body.append(told);"""
    changed = text.replace("try { start(); }", f"try {{ {code} }}")
    assert changed != text
    path = folder / "page.html"
    path.write_text(changed)
    shown = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            f"--user-data-dir={folder / 'profile'}",
            path.as_uri(),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    logits, note = json.loads(html.unescape(re.search(r'id="told">([^<]*)<', shown)[1]))
    return torch.tensor(logits).reshape(HEIGHT, WIDTH), note


def click(row, column, button):
    """A pointer pressed in the middle of a pixel."""
    return f"""{{
      const box = app.canvas.getBoundingClientRect();
      app.canvas.dispatchEvent(new PointerEvent("pointerdown", {{ button: {button},
        clientX: box.left + {column + 0.5} / {WIDTH} * box.width,
        clientY: box.top + {row + 0.5} / {HEIGHT} * box.height }}));
    }}"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_browser_finds_our_logits(picture, tmp_path):
    """Right and left clicks, one on a pixel twice, and one undone; then the keyboard."""
    head, features, image, photo = picture
    text = page(head, features, image, photo)
    script = click(2, 3, 2) + "".join(click(r, c, 0 if sign > 0 else 2) for r, c, sign in CLICKS)
    press = 'dispatchEvent(new KeyboardEvent("keydown", { key: "%s", bubbles: true }));'
    undone = click(4, 4, 0) + "window." + press % "u"
    keys = [*["ArrowUp"] * 2, "ArrowRight", "b", "Enter"]
    typed = "".join(f"app.canvas.{press % key}" for key in keys)
    found, note = run(text, script + undone + typed, tmp_path)
    clicks = [*CLICKS, (HEIGHT // 2 - 2, WIDTH // 2 + 1, -1)]
    points = torch.tensor([[click[:2] for click in clicks]])
    labels = torch.tensor([[click[2] for click in clicks]])
    with torch.no_grad():
        expected = head(features[None], image[None], points, labels).logits[0, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    share = round(100 * (expected > 0).double().mean().item())
    assert note == f"5 clicks, {share} % of the picture"
    assert 0 < share < 100


def test_the_page_needs_nothing_else(picture, tmp_path):
    path = export_html(*picture, tmp_path / "page.html", title="a <b> & c")
    text = path.read_text()
    assert text.count("a &lt;b&gt; &amp; c") == 2
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|src=|href=|import\(|fetch\(|XMLHttpRequest", text)
    assert not re.search(r"\$(title|heading|settings|data)\b", text)
    head, features, image, photo = picture
    with pytest.raises(ValueError, match="photo: expected"):
        page(head, features, image, photo[:, 1:])
    with pytest.raises(ValueError, match="image: expected"):
        page(head, features, image[None], photo)
