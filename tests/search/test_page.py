"""The page in a real browser: Chromium against the server that `./run_all.sh search` starts."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipe_lib.data.store import Store
from recipe_lib.evaluation.scores import encode
from recipe_lib.systems.saving import load_system
from tests.search.test_engine import as_text, cosines, png

ROOT = Path(__file__).parents[2]
INSTALL = "no browser for the search page: apt-get install chromium, or python -m playwright install chromium"
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
WAIT = 300_000  # milliseconds: of two cores others may have the most


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = ("chromium", "chromium-browser", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), own if Path(own).exists() else None)
        if not path:
            pytest.skip(INSTALL)
        chromium = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield chromium
        chromium.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answering(port: int, server: subprocess.Popen) -> bool:
    """Whether it is there at last; it is not where it has ended."""
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def server(outputs, browser, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """Address of the page of the study "tiny" over the recipes of iid; a folder that its temporary files are in."""
    temporary, port = tmp_path_factory.mktemp("temporary"), free_port()
    command = [sys.executable, "-m", "recipe_lib.search.command", "tiny", "--recipes", "iid", "--no-browser"]
    environment = os.environ | {"CAUSAL_KITCHEN_OUTPUTS": str(outputs), "TMPDIR": str(temporary)}
    environment |= {"CAUSAL_KITCHEN_ROOT": str(ROOT)}
    with open(temporary / "server.log", "w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            assert answering(port, process), (temporary / "server.log").read_text()
            yield f"http://localhost:{port}/", temporary
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def page(browser, server) -> Iterator:
    """The page, open; what it asks other hosts for, and scripts that it should not run, are noted."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("dialog", lambda dialog: pytest.fail(f"a script of a file name ran: {dialog.message}"))
    page.goto(server[0], timeout=WAIT)
    page.locator(".ck-zone").wait_for(timeout=WAIT)
    yield page
    page.close()


@pytest.fixture(scope="module")
def truth(outputs) -> dict:
    """What the evaluation says: cosines of photos (rows) and recipes of iid, with the term and without."""
    split = Store(outputs / "tiny/01_data_preparation/data").split("iid")
    encoded = encode(load_system(outputs / "tiny/04_debiasing_training/debiased"), split, crop=48)
    with_term = cosines(encoded.embedding + encoded.z, encoded.recipes)
    own = (with_term >= np.diag(with_term)[:, None]).sum(1)  # rank of the recipe that belongs to each photo
    known = int(np.argmin(own))
    assert own[known] <= 3, "the study has learnt something"
    without = cosines(encoded.embedding, encoded.recipes)
    return {"split": split, "known": known, "rank": int(own[known]), "with": with_term, "without": without}


def upload(page, *files: tuple[str, bytes]) -> None:
    payload = [{"name": name, "mimeType": "image/png", "buffer": data} for name, data in files]
    page.locator("input[type=file]").set_input_files(payload)


def expect(page, selector: str):
    """What waits until it is so: a list of texts, a number of nodes ..."""
    from playwright.sync_api import expect

    return expect(page.locator(selector))


def titles(page, wanted: list[str], column: int = 0) -> None:
    """The recipes of a list are these, in this order."""
    from playwright.sync_api import expect

    expect(page.locator(".ck-cards").nth(column).locator(".ck-title")).to_have_text(wanted, timeout=WAIT)


def choose(page, label: str, option: str) -> None:
    page.get_by_label(label).select_option(option)


def quiet(page) -> None:
    """Nothing is going on, and nothing has gone wrong."""
    expect(page, ".ck-status").to_have_text("", timeout=WAIT)


def reset(page) -> None:
    choose(page, "Compared with", "nothing")
    choose(page, "Surroundings", "as they are")
    expect(page, ".ck-two").to_have_count(0, timeout=WAIT)
    quiet(page)


def best(cosine: np.ndarray, split) -> list[str]:
    return [split.titles[row] for row in np.argsort(-cosine)[:10]]


def test_it_opens_empty_and_asks_no_other_host(page, server):
    assert page.locator("h1").inner_text() == "A photo in, recipes out"
    assert page.title() == "Recipe search: tiny"
    assert page.get_by_text("Choose a photo above").is_visible() and page.locator(".ck-strip button").count() == 8
    assert page.locator("pre, .jp-InputArea").count() == 0, "no code"
    others = [url for url in page.asked if not url.startswith((server[0], "data:", "blob:", "ws:"))]
    assert others == []
    assert (server[1] / "server.log").read_text() == f"the page of tiny: {server[0]} (Ctrl-C ends it)\n"


@pytest.fixture
def asked(page, truth, dishes):
    """The page with the answer for the photo whose recipe is known."""
    reset(page)
    upload(page, ("supper.png", png(dishes[truth["split"].ids[truth["known"]]])))
    expect(page, "figcaption").to_have_text("supper.png", timeout=WAIT)
    quiet(page)
    return page


def test_a_photo_whose_recipe_is_known_finds_it_where_the_evaluation_has_it(asked, truth):
    page, split, row = asked, truth["split"], truth["known"]
    titles(page, best(truth["with"][row], split))
    assert best(truth["with"][row], split)[truth["rank"] - 1] == split.titles[row]
    expect(page, ".ck-bars li").to_have_count(10)
    said = [float(text.split()[1]) for text in page.locator(".ck-facts span:text('similarity')").all_inner_texts()]
    assert said == pytest.approx(sorted(truth["with"][row], reverse=True)[:10], abs=0.006)


def test_a_card_opens_to_its_steps(asked, truth):
    page, split = asked, truth["split"]
    card = page.locator(".ck-card").first
    recipe = split.recipe(int(np.argmax(truth["with"][truth["known"]])))
    assert not card.get_by_text(recipe["instructions"][-1]).is_visible()
    card.locator("summary").click()
    assert card.get_by_text(recipe["instructions"][-1]).is_visible()
    shown = [re.sub(r"\s\d+\s%$", "", line) for line in card.locator(".ck-lines li").all_inner_texts()]
    assert shown == recipe["ingredients"]


def test_without_the_causal_term_side_by_side(asked, truth):
    page, split, row = asked, truth["split"], truth["known"]
    choose(page, "Compared with", "debiased, without its causal term")
    titles(page, best(truth["without"][row], split), 1)
    titles(page, best(truth["with"][row], split))
    orders = [list(np.argsort(-truth[name][row])[:10]) for name in ("with", "without")]
    assert orders[0] != orders[1], "the term of this study is long enough to matter"
    facts = page.locator(".ck-two section").first.locator(".ck-facts").all_inner_texts()
    for place, (recipe, fact) in enumerate(zip(orders[0], facts, strict=True)):
        if recipe not in orders[1]:
            assert "new" in fact
        elif moved := orders[1].index(recipe) - place:
            assert f"{'up' if moved > 0 else 'down'} {abs(moved)}" in fact
        else:
            assert "same place" in fact
    reset(page)


def test_two_trained_systems_side_by_side(asked):
    page = asked
    choose(page, "Compared with", "baseline")
    expect(page, ".ck-two h2").to_have_text(["debiased", "baseline"], timeout=WAIT)
    reset(page)


def seen(page, before: np.ndarray | None = None) -> np.ndarray:
    """The query photo as the page shows it, once it is another one than before."""
    for _ in range(WAIT // 100):
        address = page.locator(".ck-query img").get_attribute("src")
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))
        if before is None or not np.array_equal(pixels, before):
            return pixels
        page.wait_for_timeout(100)
    raise AssertionError("the photo stays as it was")


def test_surroundings_hidden_and_swapped(asked):
    page = asked
    whole = seen(page)
    choose(page, "Surroundings", "hidden")
    hidden = seen(page, whole)
    y, x = np.mgrid[:48, :48] - 23.5
    outside = np.hypot(x, y) > 0.4 * 48
    assert np.array_equal(hidden[~outside], whole[~outside]) and len(np.unique(hidden[outside], axis=0)) == 1
    expect(page, ".ck-two h2").to_have_text(["surroundings hidden", "the whole photo"])
    page.get_by_label("Disc that stays").focus()
    page.keyboard.press("ArrowLeft")
    smaller, outside = seen(page, hidden), np.hypot(x, y) > 0.35 * 48
    assert np.array_equal(smaller[~outside], whole[~outside]) and len(np.unique(smaller[outside], axis=0)) == 1
    choose(page, "Surroundings", "swapped for another photo's")
    swapped = seen(page, smaller)
    assert np.array_equal(swapped[~outside], whole[~outside]) and (swapped != whole)[outside].any()
    assert len(np.unique(swapped[outside], axis=0)) > 1
    reset(page)


def test_a_recipe_typed_finds_photos(asked, truth):
    page, split = asked, truth["split"]
    page.get_by_label("Recipe").fill(as_text(split.recipe(6)))
    page.get_by_role("button", name="Find its photos").click()
    page.get_by_text("The nearest photos").wait_for(timeout=WAIT)
    titles(page, best(truth["with"][:, 6], split), 1)
    page.get_by_label("Recipe").fill("  ")
    page.get_by_role("button", name="Find its photos").click()
    page.get_by_text("the recipe is empty").wait_for(timeout=WAIT)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ('<img src=x onerror="alert(1)">.jpg', b"no photo", '<img src=x onerror="alert(1)">.jpg: not an image'),
        ("empty.jpg", b"", "empty.jpg: the file is empty"),
        ("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0", "phone.heic: a HEIC photo, which cannot be read here"),
        ("dot.png", png(np.zeros((1, 1, 3), np.uint8)), "dot.png: 1 x 1 pixels is too small"),
    ],
)
def test_a_bad_upload_is_one_line_and_the_page_goes_on(page, name, data, said):
    before = page.locator(".ck-strip button").count()
    upload(page, (name, data))
    page.locator(".ck-error").get_by_text(said).wait_for(timeout=WAIT)
    assert page.locator(".ck-strip button").count() == before and page.locator("img[src=x]").count() == 0
    page.locator(".ck-strip button").nth(0).click()
    quiet(page)


def test_two_uploads_at_once_dropped_and_pasted(page, dishes):
    first, second, third = (png(pixels) for pixels in list(dishes.values())[:3])
    before = page.locator(".ck-strip .ck-own").count()
    upload(page, ("one.png", first), ("bad.png", b""), ("<b>two</b>.png", second))
    page.get_by_label("Your photo one.png").wait_for(timeout=WAIT)
    page.get_by_label("Your photo <b>two</b>.png").wait_for(timeout=WAIT)
    expect(page, "figcaption").to_have_text("<b>two</b>.png", timeout=WAIT)
    expect(page, ".ck-error").to_have_text("bad.png: the file is empty", timeout=WAIT)
    for event, field in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([event, field, name, bytes]) => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
              const made = event === "drop" ? new DragEvent(event, { [field]: data, bubbles: true, cancelable: true })
                : new ClipboardEvent(event, { [field]: data, bubbles: true, cancelable: true });
              document.body.dispatchEvent(made);
            }""",
            [event, field, f"{event}.png", list(third)],
        )
        expect(page, "figcaption").to_have_text(f"{event}.png", timeout=WAIT)
    assert page.locator(".ck-strip .ck-own").count() == before + 4
    quiet(page)


def test_a_photo_of_forty_megabytes(page, tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(3700, 3700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png", compress_level=0)
    assert (tmp_path / "large.png").stat().st_size > 40_000_000
    page.locator("input[type=file]").set_input_files(tmp_path / "large.png")
    expect(page, "figcaption").to_have_text("large.png", timeout=WAIT)
    quiet(page)


def test_uploads_are_written_nowhere(asked, server, outputs, dishes, truth):
    page, data = asked, png(dishes[truth["split"].ids[truth["known"]]])
    for folder in (server[1], outputs):
        for path in folder.rglob("*"):
            assert "supper" not in path.name
            if path.is_file() and not path.is_socket():
                kept = path.read_bytes()
                assert data not in kept and b"supper.png" not in kept, path
    for name in ("supper.png", "voila/files/supper.png", "voila/files/search.ipynb"):
        answer = page.request.get(f"{server[0]}{name}")
        assert answer.status in (403, 404), name


def test_it_listens_on_this_computer_alone_and_under_its_own_name(page, server):
    port = int(server[0].rsplit(":")[-1].strip("/"))
    with socket.socket() as probe:
        probe.settimeout(1)
        try:
            probe.connect(("8.8.8.8", 53))  # to learn this machine's address; nothing is sent
            address = probe.getsockname()[0]
        except OSError:
            address = "127.0.0.2"
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex((address, port)) != 0
    answer = page.request.get(server[0], headers={"Host": "evil.example"})
    assert answer.status == 403


def test_keyboard_alone(asked):
    page = asked
    page.locator(".ck-strip button").first.focus()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.type") == "file"
    assert page.evaluate("getComputedStyle(document.querySelector('.ck-zone')).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    wanted = page.locator(":focus").get_attribute("title")
    page.keyboard.press("Enter")
    expect(page, "figcaption").to_have_text(wanted, timeout=WAIT)
    expect(page, ":focus").to_have_attribute("aria-pressed", "true")
    page.locator(".ck-card summary").first.focus()
    page.keyboard.press("Space")
    assert page.locator(".ck-card details").first.evaluate("node => node.open")


@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_the_screen_and_axe_finds_nothing_serious(asked, width, compared):
    page = asked
    axe = pytest.importorskip("axe_playwright_python.base", reason="pip install axe-playwright-python")
    page.set_viewport_size({"width": width, "height": 800})
    choose(page, "Compared with", "debiased, without its causal term" if compared else "nothing")
    choose(page, "Surroundings", "hidden")
    expect(page, ".ck-two h2").to_have_count(2, timeout=WAIT)
    quiet(page)
    wide = page.evaluate(
        """() => [...document.querySelectorAll('.ck-page *')].filter(node => !node.closest('.ck-file, .ck-hidden')
             && node.getBoundingClientRect().right > window.innerWidth + 1).map(node => node.className)"""
    )
    assert wide == []
    script = Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    page.evaluate(script)
    faults = page.evaluate("axe.run().then(result => result.violations)")
    serious = [(f["impact"], f["id"], f["nodes"][0]["html"]) for f in faults if f["impact"] in ("serious", "critical")]
    assert serious == [], json.dumps(serious, indent=1)
    reset(page)
    page.set_viewport_size({"width": 1200, "height": 900})
