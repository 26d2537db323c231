"""The site builds without a warning, its links lead somewhere, a browser shows and searches it."""

import os
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.helpers.paths import REPO

pytestmark = pytest.mark.timeout(600)
SCREENSHOT_FOLDER = os.environ.get("SCREENSHOTS")


class Page(HTMLParser):
    """The links, pictures and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.targets += [value for key in ("href", "src") if (value := values.get(key))]
        self.anchors |= {value for key in ("id", "name") if (value := values.get(key))}


def broken_targets(site: Path) -> list[str]:
    """Return the links and pictures whose file or anchor the site does not have."""
    pages = {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            to = (path.parent / unquote(url.path)).resolve() if url.path else path
            has_anchor = not url.fragment or to not in pages or url.fragment in pages[to].anchors
            if not to.is_file() or not has_anchor:
                broken.append(f"{path.relative_to(site)}: {target}")
    return broken


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for module in ("furo", "myst_nb"):
        pytest.importorskip(module, reason="needs the extra docs: make docs")
    folder: Path = tmp_path_factory.mktemp("site").resolve()
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--conf-dir", "docs"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ".", str(folder)],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_links_and_pictures_of_the_site_exist(site):
    assert (site / "docs/training.html").is_file()
    assert (site / "source/yolo_lightning/losses.py.html").is_file()
    assert broken_targets(site) == []


def test_targets_that_do_not_exist_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#c">1</a> <img src="d.png"> <i id="e">')
    (tmp_path / "b.html").write_text('<a href="a.html#e">2</a> <a href="https://a.org/f">3</a>')
    assert broken_targets(tmp_path) == ["a.html: b.html#c", "a.html: d.png"]


def show(browser, page: Path, name: str, width: int = 1400) -> None:
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    if SCREENSHOT_FOLDER:
        browser.save_screenshot(str(Path(SCREENSHOT_FOLDER) / f"site-{name}.png"))


@pytest.mark.browser
def test_the_first_page_has_pictures_code_and_navigation(browser, site):
    show(browser, site / "index.html", "start")
    deadline = time.monotonic() + 20
    while "boxes and image labels together" not in browser.find_element("tag name", "body").text:
        assert time.monotonic() < deadline, "index.html does not lead to the first page"
    assert browser.find_elements("css selector", ".highlight-sh pre")
    navigation = browser.find_element("class name", "sidebar-tree").text
    assert {"Training", "Hyper-parameters", "Python API"} <= set(navigation.splitlines())
    widths = "return [...document.images].map(image => image.naturalWidth)"
    assert all(browser.execute_script(widths))


@pytest.mark.browser
def test_a_search_finds_a_page(browser, site):
    show(browser, site / "README.html", "search")
    browser.find_element("name", "q").send_keys("momentum\n")
    page = "#search-results a[href*='docs/hyper-parameters.html']"
    deadline = time.monotonic() + 20
    while not browser.find_elements("css selector", page):
        assert time.monotonic() < deadline, "the search does not find the page of momentum"


@pytest.mark.browser
def test_no_page_is_wider_than_a_telephone(browser, site):
    wide = []
    for page in sorted([*site.glob("*.html"), *site.glob("docs/*.html")]):
        show(browser, page, f"phone-{page.stem}", width=390)
        if browser.execute_script("return document.documentElement.scrollWidth") > 390:
            wide.append(page.name)
    assert wide == []
