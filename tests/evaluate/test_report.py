"""The report page: self-contained, escaped, and shown by a browser."""

from __future__ import annotations

import base64
import dataclasses
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from servegym.evaluate.report import report_page, write_report
from servegym.problems.problem import Section

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NUM_IMAGES = 5  # ratios, distributions, load, Gantt chart, balance
#: Tells in the page's text how many images the browser has decoded, and how large they are.
PROBE = """<script>window.onload = () => {
  const images = [...document.images];
  const whole = images.filter(i => i.complete && i.naturalWidth > 300 && i.naturalHeight > 50);
  document.body.dataset.decoded = whole.length + "/" + images.length;
};</script>"""


@pytest.fixture(scope="module")
def result(compared):
    return dataclasses.replace(
        compared,
        learned=["speed-family"],
        saturation={"round-robin": {0.9: 1.25, 0.99: 0.5}},
    )


@pytest.fixture(scope="module")
def page(result) -> str:
    return report_page(result)


class Tags(HTMLParser):
    """Collects tags and checks that they nest."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag


def test_page_is_well_formed_and_needs_nothing_but_itself(page):
    tags = Tags()
    tags.feed(page)
    assert tags.opened == []
    for tag, attributes in tags.seen:
        assert tag not in ("script", "link", "iframe")
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith("data:")
    assert not re.search(r"(https?|file)://|url\(|@import", page)


def test_images_are_whole_pngs_with_a_description(page):
    images = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page)
    assert len(images) == NUM_IMAGES
    for alt, data in images:
        raw = base64.b64decode(data, validate=True)
        assert raw.startswith(b"\x89PNG\r\n\x1a\n")
        assert raw.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", raw[16:24])
        assert width > 300
        assert height > 50
        assert len(alt) > 10


def test_page_tells_names_verdict_and_numbers(page, result):
    assert "small &amp; &lt;mixed&gt;" in page  # the scenario's name, escaped
    assert "<mixed>" not in page
    for load in result.loads:
        assert f"Load {load:g}: the best rule is <b>round-robin</b>" in page
    # at the higher load the learned one is clearly faster; the best rule is no longer itself
    r = result.ratio("speed-family", "round-robin", 1.5, "e2e_mean_s")
    assert r.high < 1
    assert f"speed-family is faster than round-robin: ratio {r.value:.3f}" in page
    assert "Only 3 seeds" in page
    assert "<td>1.25</td><td>0.50</td>" in page
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page)


def test_page_is_written_into_new_folders(result, tmp_path, page):
    path = tmp_path / "a" / "b" / "report.html"
    write_report(result, path)
    assert path.read_text(encoding="utf-8") == page


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
def test_browser_shows_the_page_and_decodes_every_image(page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    shown = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-500:]
    assert f'data-decoded="{NUM_IMAGES}/{NUM_IMAGES}"' in shown.stdout
    assert "<h1>small &amp; &lt;mixed&gt;</h1>" in shown.stdout


def test_what_is_said_beside_the_comparison_is_escaped_and_shown(result, undrawn):
    section = Section(
        "Mine & rule's", ["It is < 1 s.", "So it is."], "<img alt='x' src=''>", "How."
    )
    page = report_page(result, [section])
    assert "<h2>Mine &amp; rule&#x27;s</h2><p>It is &lt; 1 s.</p><p>So it is.</p><img" in page
    assert "Mine" not in report_page(result)
