"""Pictures of pages for the README and the docs: `make screenshots`, after `make quickstart`. Needs Chromium
(`apt-get install chromium`, or its path in CHROMIUM) and Playwright (`python -m pip install playwright`)."""

import os
import shutil
from pathlib import Path

from mosaics.training.run_page import write_run_page

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "quickstart"
SIZE = {"width": 900, "height": 1260}


def main() -> None:
    """Make the pages that are not there yet, and picture each."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise SystemExit("Playwright is not installed: python -m pip install playwright") from None
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or not (RUN / "comparison" / "report.html").is_file():
        raise SystemExit("give Chromium (apt-get install chromium, or its path in CHROMIUM), and run make quickstart")
    pages = {"report": RUN / "comparison" / "report.html", "run": write_run_page(RUN, RUN / "page" / "run.html")}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, page in pages.items():
            shown = browser.new_page(viewport=SIZE, color_scheme="light")
            shown.goto(page.resolve().as_uri())
            shown.screenshot(path=ROOT / "docs" / "images" / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
