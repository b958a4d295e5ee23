"""Pictures of pages for the README and the docs, `docs/images/{inspect,report,run}.png`: `make screenshots`.

Of the model that comes along, and of the run of `make quickstart` (another with `--run FOLDER`); only some by their
names. Needs Chromium (`apt-get install chromium`, or its path in CHROMIUM) and Playwright, which the Makefile installs.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mosaics.cli import main as mosaics

ROOT = Path(__file__).parents[1]
SIZES = {"inspect": (1200, 900), "report": (900, 1260), "run": (900, 1260)}


def main() -> None:
    """Make the pages and picture each."""
    parser = argparse.ArgumentParser(description="Picture the pages.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SIZES)}; all without any")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "quickstart", help="of mosaics quickstart")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="where the pictures go")
    given = parser.parse_args()
    names = given.names or list(SIZES)
    if unknown := set(names) - set(SIZES):
        sys.exit(f"there is no picture {unknown.pop()!r}; name some of {', '.join(SIZES)}")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("Playwright is not installed: python -m pip install playwright")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("there is no Chromium: apt-get install chromium, or give its path in CHROMIUM")
    report = given.run / "comparison" / "report.html"
    if names != ["inspect"] and not report.is_file():
        sys.exit(f"there is no {report}; run make quickstart, or name another run with --run")
    given.images.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages = {"inspect": Path(folder) / "inspect.html", "report": report, "run": Path(folder) / "run" / "run.html"}
        of = {"inspect": ("demo", "--prompt-file", ROOT / "examples" / "questions.txt"), "run": (given.run,)}
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in names:
            if name in of and mosaics(["inspect", *map(str, of[name]), "--output", str(pages[name])]):
                sys.exit(1)
            width, height = SIZES[name]
            shown = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
            shown.goto(pages[name].resolve().as_uri())
            if name == "inspect":
                shown.wait_for_selector("body[data-ready]")
                shown.click(".tok:has-text('owl') >> nth=-1")
                shown.evaluate("scrollTo(0, 0)")
            shown.screenshot(path=given.images / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
