"""The page in a browser: nothing overflows, nothing is asked for, nothing is complained of."""

from __future__ import annotations

import copy

import pytest
from browser import CHROMIUM, browsing
from made_runs import METRICS, made_run

from rl_sparsity_tf.report.page import render_fragment, render_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        yield found


def long_names():
    """A run whose names are longer than a telephone is wide, and go without a space."""
    run = made_run()
    long = "block_without_any_space/" * 8 + "kernel"
    run["plan"]["kernels"][1]["path"] = long
    run["name"] = run["metrics"]["dataset"] = long
    run["metrics"]["warnings"] = [long]
    run["metrics"]["baselines"][0]["name"] = run["metrics"]["compressed"]["proposed_by"] = long
    run["history"][0]["proposed_by"] = "x" * 60
    run["details"]["file"]["tensors"][0]["kernel"] = long
    run["manifest"]["arguments"]["metric"] = long
    run["details"]["file"]["notes"] = [long]
    return run


def large_map():
    entry = {
        **{"path": "large/kernel", "shape": [700, 500], "layout": "io", "group": "element"},
        **{"bits": 8, "default": "prune"},
        "exceptions": [[n, 3, "quantize"] for n in range(0, 349_000, 997)],
    }
    return made_run(plan={"kernels": [entry] * 3})


PAGES = {
    "finished": made_run,
    "cut off": lambda: made_run(metrics=None, plan=None, details=None),
    "old": lambda: made_run(details=None, manifest=None),
    "long names": long_names,
    "large map": large_map,
}


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(PAGES[request.param]()), encoding="utf-8")
    return path


def check_quiet(browser, path):
    asked = {one["request"]["url"] for one in browser.told("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
    assert browser.told("Log.entryAdded") == []
    assert browser.told("Runtime.consoleAPICalled") == []
    assert browser.told("Runtime.exceptionThrown") == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_fits_asks_for_nothing_and_nothing_is_wrong_with_it(browser, page, width):
    browser.open(page, width=width)
    check_quiet(browser, page)
    assert browser.value("document.compatMode") == "CSS1Compat"
    assert browser.value("document.documentElement.scrollWidth") <= width
    # What is wider than the page is in a box of its own that can be moved.
    outside = (
        "[...document.querySelectorAll('body *')].filter(e => "
        "e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll')).length"
    )
    assert browser.value(outside) == 0


CONTRAST = """
(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const page = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll('p, td, th, h1, h2, dt, dd, small, span, li')]
    .filter(e => e.textContent.trim() && !e.closest('.notice') && !e.closest('.cards'))
    .map(e => ratio(light(getComputedStyle(e).color), page));
  const marks = [...document.querySelectorAll('svg [class^="c"], svg [class^="op-"]')]
    .map(e => getComputedStyle(e).fill).filter(c => c !== 'none')
    .map(c => ratio(light(c), page));
  return [page, Math.min(...texts), Math.min(...marks)];
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_everything_can_be_read_in_both_schemes(browser, page, dark):
    """Contrasts of WCAG 2.2, level AA: 4.5 for texts, 3 for what is drawn."""
    browser.open(page, width=1280, dark=dark)
    check_quiet(browser, page)
    background, texts, marks = browser.value(CONTRAST)
    assert (background < 0.1) is dark
    assert texts >= 4.5
    assert marks is None or marks >= 3.0


def test_the_fragment_of_a_notebook_fits(browser, tmp_path):
    metrics = copy.deepcopy(METRICS)
    path = tmp_path / "cell.html"
    fragment = render_fragment(made_run(metrics=metrics))
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{fragment}", encoding="utf-8")
    browser.open(path, width=700)
    assert browser.value("document.documentElement.scrollWidth") <= 700
    assert browser.value("document.querySelectorAll('.rls svg.chart').length") == 2


def test_the_browser_sees_what_is_wrong(browser, tmp_path):
    """What the tests above look for is found where it is there."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<!DOCTYPE html><body><div style='width:2000px'>wide</div>"
        "<img src='missing.png'><script>console.error('no'); throw new Error('x')</script>"
    )
    browser.open(path, width=390)
    assert browser.value("document.documentElement.scrollWidth") > 390
    assert len(browser.told("Network.requestWillBeSent")) == 2
    assert browser.told("Runtime.consoleAPICalled")
    assert browser.told("Runtime.exceptionThrown")
