"""The page in a browser: on phone and desktop, light and dark, nothing overflows, loads or complains.

Needs Chromium and its driver (Debian: `chromium`, `chromium-driver`). BILEVEL_SHOTS=DIR keeps screenshots.
"""

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
import saved_results

from bilevel.tuning.data import load_table
from bilevel.tuning.report import render

WIDTHS = {390: 844, 1280: 900}

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

CONTRAST = """
const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : Math.pow((c + 0.055) / 1.055, 2.4);
const light = rgb => 0.2126 * channel(rgb[0]) + 0.7152 * channel(rgb[1]) + 0.0722 * channel(rgb[2]);
const rgba = text => text.match(/[\\d.]+/g).map(Number);
const paper = node => {
  for (; node; node = node.parentElement) {
    const found = rgba(getComputedStyle(node).backgroundColor);
    if (found.length == 3 || found[3] == 1) return found;
  }
  return [255, 255, 255];
};
let worst = [21, ""];
for (const node of document.querySelectorAll("main *")) {
  if (![...node.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
  const style = getComputedStyle(node);
  const pair = [light(rgba(node.closest("svg") ? style.fill : style.color)), light(paper(node))];
  const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  if (ratio < worst[0]) worst = [ratio, node.outerHTML.slice(0, 80)];
}
return worst;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "no chromium or chromedriver (Debian: chromium, chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def show(browser, page: Path, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": WIDTHS[width], "deviceScaleFactor": 1}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics | {"mobile": width < 500})
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())


def requests(browser) -> list[str]:
    """Addresses that the page asked for, itself and inline data left out."""
    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
    assert found, "the performance log is empty"
    return [address for address in found[1:] if not address.startswith("data:")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    X = load_table("digits", None).X
    table = saved_results.clean_result()
    table.result["suspects"] *= 2
    long = saved_results.tune_result()
    long.result["hyperparameters"]["penalties"] = [
        {"feature": f"a column with a rather long name, number {i}" + "x" * i, "penalty": 10.0**-i}
        for i in range(60)
    ]
    long.result["data"] = "a/path/without/a/place/to/break/" * 3
    found = {
        "tune": render(saved_results.tune_result()),
        "clean": render(saved_results.clean_result(), X),
        "table": render(table),
        "long": render(long),
    }
    for name, text in found.items():
        (folder / f"{name}.html").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["tune", "clean", "table", "long"])
def test_page_fits_and_is_quiet(name, browser, pages, tmp_path):
    shots = Path(os.environ.get("BILEVEL_SHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    backgrounds = {}
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            show(browser, pages / f"{name}.html", width, scheme)
            assert requests(browser) == []
            assert browser.get_log("browser") == []
            assert browser.execute_script("return innerWidth") == width
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            body = "return getComputedStyle(document.body).backgroundColor"
            backgrounds[scheme] = browser.execute_script(body)
            ratio, where = browser.execute_script(CONTRAST)
            assert ratio >= 4.5, f"contrast {ratio:.2f}: {where}"
            image = browser.execute_cdp_cmd(
                "Page.captureScreenshot", {"captureBeyondViewport": True}
            )
            path = shots / f"{name}-{width}-{scheme}.png"
            path.write_bytes(base64.b64decode(image["data"]))
            assert path.stat().st_size > 10_000
    assert backgrounds["light"] != backgrounds["dark"]
