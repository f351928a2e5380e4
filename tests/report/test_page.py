from __future__ import annotations

import re
import stat
from html.parser import HTMLParser

import pytest

from cskv.errors import CSKVError
from cskv.evaluation.spectra import write_csv
from cskv.report import gather, write_report
from tests.plots.support import PNG, decay
from tests.report.support import small_run

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A report of everything, with names that want to be markup, and a run that overlaps another."""
    folder = tmp_path_factory.mktemp("results")
    run = small_run(folder / "first.json", ("PCA", "<script>alert(1)</script>"))
    run.settings["prompt"] = "<img src=x onerror=alert(1)>"
    run.settings["nested"] = {"a": {"b": [1, None]}, "flag": True}
    run.save()
    small_run(folder / "<b>.json", ("PCA",), date="2027-01-01T00:00:00+00:00")
    (folder / "other.json").write_text("{}")
    write_csv(decay(2, ("weight",)), folder / "spectra.csv")
    out = folder / "out"
    return write_report(gather([folder]), out, "A <title>")


def test_the_page_is_whole(whole):
    text = whole.page.read_text(encoding="utf-8")
    page = Elements(text)
    headings = [attributes["id"] for attributes in page.of("h2")]
    assert headings == ["summary", "divergence", "accuracy", "perplexity", "agreement", "needles", "spectra", "runs"]
    assert [attributes["href"] for attributes in page.of("a")] == [f"#{name}" for name in headings]
    for word in ("bfloat16", "A made-up processor", "2.13.0", "2026-11-25 10:00 UTC", "Seeds: 0, 1", "flag"):
        assert word in text
    assert "other.json" in text


def test_names_from_files_are_text_and_never_markup(whole):
    page = Elements(whole.page.read_text(encoding="utf-8"))
    assert not page.of("script")
    assert not page.of("b")
    assert len(page.of("title")) == 1
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.of("img"))
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    assert all("/" not in path.name and "<" not in path.name for path in whole.figures)


def test_nothing_is_loaded_from_elsewhere(whole):
    text = whole.page.read_text(encoding="utf-8")
    page = Elements(text)
    assert not [tag for tag, _ in page.found if tag in ("link", "iframe", "object", "embed", "base", "video", "audio")]
    references = [
        value for _, a in page.found for name, value in a.items() if name in ("src", "href", "srcset", "action")
    ]
    assert all(value.startswith(("#", "data:")) for value in references)
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_figure_has_words_and_a_file(whole):
    images = Elements(whole.page.read_text(encoding="utf-8")).of("img")
    assert len(images) == len(whole.figures) == len({path.name for path in whole.figures})
    assert all(len(image["alt"]) > 40 and int(image["width"]) > 300 for image in images)
    assert all(path.parent == whole.page.parent and path.read_bytes().startswith(PNG) for path in whole.figures)


def test_rows_of_an_older_run_give_way_and_the_page_says_so(whole):
    text = re.sub(r"\s+", " ", whole.page.read_text(encoding="utf-8"))
    assert whole.replaced == 108
    note = "108 rows of first.json (2026-11-25 10:00 UTC) are left out: &lt;b&gt;.json (2027-01-01 00:00 UTC) is newer"
    assert note in text
    assert "with other settings (nested, prompt)" in text


def test_sections_without_data_are_left_out(tmp_path):
    run = small_run(tmp_path / "a.json", ("PCA",))
    run.rows = [row for row in run.rows if row["task"] == "lines"]
    run.environment, run.settings = {}, {}
    del run.model["name"], run.model["layers"]
    run.save()
    text = write_report(gather([tmp_path]), tmp_path / "out").page.read_text(encoding="utf-8")
    assert [attributes["id"] for attributes in Elements(text).of("h2")] == ["summary", "accuracy", "runs"]
    assert "undated" in text


def test_rows_without_bytes_have_a_table_and_no_figure(tmp_path):
    run = small_run(tmp_path / "a.json", ("PCA",))
    run.rows = [row | {"cache": None} for row in run.rows if row["task"] in ("lines", "perplexity")]
    run.save()
    written = write_report(gather([tmp_path]), tmp_path / "out")
    assert written.figures == []
    assert "–" in written.page.read_text(encoding="utf-8")


def test_an_earlier_report_is_replaced(tmp_path):
    run = small_run(tmp_path / "a.json", ("PCA",))
    run.rows = [row for row in run.rows if row["task"] == "perplexity"]
    run.save()
    first = write_report(gather([tmp_path]), tmp_path / "out", "first")
    before = sorted(path.name for path in first.page.parent.iterdir())
    first.figures[0].write_bytes(b"old")
    again = write_report(gather([tmp_path]), tmp_path / "out", "second")
    assert again.figures[0].read_bytes().startswith(PNG)
    assert "<title>second</title>" in again.page.read_text(encoding="utf-8")
    assert sorted(path.name for path in first.page.parent.iterdir()) == before  # no temporary file is left


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    small_run(tmp_path / "a.json", ("PCA",))
    (tmp_path / "file").write_text("")
    with pytest.raises(CSKVError, match="cannot write"):
        write_report(gather([tmp_path]), tmp_path / "file" / "out")
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)
