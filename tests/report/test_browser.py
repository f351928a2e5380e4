"""The page in a real browser, without a network. Skipped where Chromium or Playwright is missing."""

from __future__ import annotations

import pytest

from cskv.evaluation.spectra import write_csv
from cskv.report import gather, write_report
from tests.plots.made_up import make_run
from tests.plots.support import decay
from tests.report.support import browser

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium is installed")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip

OVERLAPS = """() => {
  // Siblings that are blocks must not cover each other; 1 px is rounding.
  const bad = [];
  const blocks = "h1,h2,h3,h4,p,nav,ul,li,section,article,figure,figcaption,main,tr,.scroll,.tables,.tables > div";
  for (const parent of document.querySelectorAll("body, body *")) {
    const children = [...parent.children].filter(child => child.matches(blocks));
    const boxes = children.map(child => child.getBoundingClientRect());
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, b] = [boxes[i], boxes[j]];
      const over = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const names = [children[i], children[j]].map(child => child.outerHTML.slice(0, 80));
      if (over > 1 && across > 1) bad.push(names.join(" / "));
    }
  }
  return bad;
}"""
SPILLS = """() => [...document.querySelectorAll("h1,h2,h3,h4,p,li,figcaption,td,th")]
  .filter(element => element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0)
  .map(element => element.outerHTML.slice(0, 100))"""
IMAGES = "() => [...document.images].map(image => [image.naturalWidth, image.alt, image.getBoundingClientRect().width])"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report as large as a real comparison, with one very long name."""
    folder = tmp_path_factory.mktemp("browser")
    run = make_run(folder / "run.json", seeds=(0,))
    run.rows = [
        row for row in run.rows if (row["task"], row["size"]) != ("needle", 4096) and row["task"] != "needle-pairs"
    ]
    for row in run.rows:
        row["method"] = {"H2O": "a-method-with-one-very-long-word-" + "x" * 60}.get(row["method"], row["method"])
    run.settings["a long value"] = "y" * 300
    run.save()
    write_csv(decay(12, ("weight", "calibrated")), folder / "spectra.csv")
    return write_report(gather([folder]), folder / "out").page


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as api:
        running = api.chromium.launch(executable_path=browser(), args=FLAGS)
        yield running
        running.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_and_is_whole(chromium, page_file, width, scheme):
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:80]}"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.resolve().as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("window.innerWidth")
    images = page.evaluate(IMAGES)
    assert len(images) >= 6
    assert all(natural > 0 and alt and shown > 300 for natural, alt, shown in images)
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(SPILLS) == []
    assert all(url.startswith(("data:", page_file.resolve().as_uri())) for url in requests)
    assert complaints == []
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    card = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert (shade == "rgb(255, 255, 255)") == (scheme == "light")
    assert card == "rgb(255, 255, 255)"
    context.close()


def test_links_lead_to_their_sections(chromium, page_file):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(page_file.resolve().as_uri())
    page.click("nav a[href='#needles']")
    assert 0 <= page.evaluate("document.getElementById('needles').getBoundingClientRect().top") < 200
    page.close()
