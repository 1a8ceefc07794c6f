"""The pictures of the search page that the README shows: python -m tests.search.screenshots [study]

They go to outputs/reference/search_*.png; the study must have been run, and a browser must be there (see test_page).
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from recipe_lib.paths import repo_root
from tests.search.test_page import QUIET, WAIT, answering, choose, expect, free_port, quiet

PHOTO = 2  # of the strip


def take(page: Page, name: str) -> None:
    """A picture of what is in the window, in few colours: a README is read over a network."""
    quiet(page)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    few = picture.quantize(160, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(repo_root() / "outputs" / "reference" / f"search_{name}.png", optimize=True)


if __name__ == "__main__":
    port = free_port()
    command = [sys.executable, "-m", "recipe_lib.search.command", *sys.argv[1:], "--no-browser", "--port", str(port)]
    with sync_playwright() as playwright, contextlib.ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(command))
        stack.callback(server.terminate)
        answering(port, server)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        page = browser.new_page(viewport={"width": 1160, "height": 1120})
        page.goto(f"http://localhost:{port}/", timeout=WAIT)
        page.locator(".ck-strip button").nth(PHOTO).click(timeout=WAIT)
        expect(page, ".ck-card").to_have_count(10, timeout=WAIT)
        take(page, "answer")
        choose(page, "Surroundings", "hidden")
        expect(page, ".ck-two h2").to_have_count(2, timeout=WAIT)
        take(page, "surroundings")
        browser.close()
