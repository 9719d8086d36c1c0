"""The page in a real browser: no errors, nothing too wide, a slider that moves the figures, keys that reach all."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memc.report.html import render
from memc.report.pictures import bench_page, compare_page
from memc.report.quality import eval_page
from tests.cli.browser import CHROMIUM, PHONE, framed, run, screenshots
from tests.cli.documents import benched, recalled
from tests.cli.test_compare import chosen
from tests.cli.test_views import report, trained

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

PROBE = """
<script>addEventListener("load", () => {
  const slider = document.getElementById("context"), seen = {errors: [], shown: !slider.closest("p").hidden};
  const say = () => ["tokens", "state-b", "time-ratio"].map(id => document.getElementById(id).textContent);
  seen.first = say(); slider.value = 0; slider.dispatchEvent(new Event("input")); seen.moved = say();
  seen.spoken = slider.getAttribute("aria-valuetext");
  const reached = [...document.querySelectorAll("input, summary, [tabindex='0']")];
  seen.controls = reached.length;
  seen.focused = reached.filter(one => { one.focus(); return document.activeElement === one; }).length;
  document.querySelector("summary").click(); seen.opened = document.querySelector("details").open;
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  const out = document.createElement("pre");
  out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
});</script>
"""


def browse(page: str, folder: Path, width: int, *, strict: bool = True) -> tuple[dict[str, Any], str]:
    """Open a page and return what a probe in it saw, and what the browser complained of.

    The probe is a second script: ``strict`` leaves the page's own policy, under which it must not run.
    """
    path = folder / "page.html"
    loose = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page)
    path.write_text((page if strict else loose).replace("</main>", f"</main>{PROBE}"))
    out, complaints = run(path, width)
    found = re.search(r'<pre id="seen">(.*?)</pre>', out)
    return json.loads(found[1]) if found else {}, complaints


@pytest.mark.parametrize("width", [500, 1200])
def test_the_slider_moves_the_figures_and_keys_reach_every_control(width: int, tmp_path: Path) -> None:
    seen, complaints = browse(render(trained()), tmp_path, width, strict=False)
    assert complaints == ""
    assert seen["shown"] and seen["opened"]
    assert seen["first"] == ["32,768", "360 MiB", "0.477x"]
    assert seen["moved"] == ["128", "1.41 MiB", "0.993x"]
    assert seen["spoken"] == "128 tokens"
    assert seen["controls"] == seen["focused"] > 30
    assert seen["overflow"] <= 0


def test_the_policy_lets_nothing_but_the_page_run(tmp_path: Path) -> None:
    seen, complaints = browse(render(report()), tmp_path, 1200)
    assert seen == {} and "Content Security Policy" in complaints


LONG = "a-folder-whose-name-has-no-place-to-be-broken-at-" * 3


PAGES: dict[str, Callable[[], str]] = {
    "report": lambda: render(trained()),
    "eval": lambda: eval_page(recalled()),
    "bench": lambda: bench_page(benched().model_copy(update={"sides": {"a": LONG, "b": "dense"}})),
    "compare": lambda: compare_page(chosen(LONG)),
}


@pytest.mark.parametrize("name", ["eval", "bench", "compare"])
def test_a_page_of_pictures_opens_without_complaint(name: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(PAGES[name]())
    out, complaints = run(tmp_path / "page.html", 1200)
    assert complaints == "" and "<svg" in out


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_a_phone(name: str, planted: bool, tmp_path: Path) -> None:
    """Chromium has no window under 500 pixels: the page is looked at in a frame of 360."""
    page = PAGES[name]()
    (tmp_path / "inner.html").write_text(
        page.replace("h1, h2,", "main { min-width: 25rem; } h1, h2,") if planted else page
    )
    shown, wide, _ = framed(tmp_path / "inner.html", tmp_path / "outer.html", PHONE)
    assert shown == PHONE
    assert (wide > PHONE) == planted


def test_pictures_of_a_page_are_whole_and_of_two_colours(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGES["report"]())
    light, dark, phone, paper = screenshots(page, tmp_path / "pictures")
    sizes = [struct.unpack(">II", path.read_bytes()[16:24]) for path in (light, dark, phone)]
    assert [width for width, _ in sizes] == [1200, 1200, 500]
    assert sizes[0] == sizes[1] and sizes[2][1] > sizes[0][1] > 2000, "a page is higher on a phone"
    assert light.read_bytes() != dark.read_bytes()
    assert paper.read_bytes().startswith(b"%PDF")
