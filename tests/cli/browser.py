"""A page in Chromium: its document, and pictures of it to look at.

python -m tests.cli.browser OUT FOLDER    # of the report of the artifact OUT: what ``make screenshots`` calls
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

DARK = "--blink-settings=preferredColorScheme=0"
WIDE, PHONE = 1200, 360

FRAME = (
    '<body style="margin:0"><iframe id="f" src="{page}" width="{width}" height="{height}" style="border:0"></iframe>'
    "<script>"
    'document.getElementById("f").onload = e => {{ const d = e.target.contentDocument.documentElement;'
    ' document.title = d.clientWidth + " " + d.scrollWidth + " " + d.scrollHeight; }}</script></body>'
)
"""A page in a frame of any width: Chromium has no window under 500 pixels."""


def run(path: Path, width: int, *options: str, height: int = 900) -> tuple[str, str]:
    """Return the document that a page becomes, and the lines of the browser's console."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--hide-scrollbars", f"--window-size={width},{height}", "--virtual-time-budget=3000", *options]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def framed(page: Path, frame: Path, width: int, height: int = 800) -> tuple[int, int, int]:
    """Put a page into a frame and return how wide it is shown, how wide it would be, and how high it is, in pixels."""
    frame.write_text(FRAME.format(page=page.absolute().as_uri(), width=width, height=height))
    out, _ = run(frame, WIDE, "--allow-file-access-from-files")
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", out)
    assert found is not None
    shown, wide, high = map(int, found.groups())
    return shown, wide, high


def screenshots(page: Path, folder: Path) -> list[Path]:
    """Write pictures of a whole page: in light and dark, as wide as a phone, and as it is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    frame, made = folder / "frame.html", []
    for name, width, options in (("light", WIDE, ()), ("dark", WIDE, (DARK,)), ("phone", PHONE, ())):
        _, _, height = framed(page, frame, width)
        framed(page, frame, width, height)
        made.append(folder / f"{name}.png")
        run(frame, max(width, 500), f"--screenshot={made[-1]}", *options, height=height)
    made.append(folder / "print.pdf")
    run(page.absolute(), WIDE, f"--print-to-pdf={made[-1]}", "--no-pdf-header-footer")
    frame.unlink()
    return made


def main(out: str, folder: str) -> None:
    """Write the pages of an artifact's report and of nothing else, and pictures of it."""
    from memc.report.read import read_report

    page = Path(folder) / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(read_report(Path(out)).to_html())
    for path in screenshots(page, Path(folder)):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
