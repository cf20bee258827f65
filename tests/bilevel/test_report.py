"""The report says what the result holds, escapes what users named, and takes results with gaps."""

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import saved_results

from bilevel import cli
from bilevel.tuning.data import load_table
from bilevel.tuning.report import charts, render
from bilevel.tuning.results import Saved

TITLES = {
    "penalties": "Penalties",
    "baselines": "Against what one would have used instead",
    "history": "Outer steps",
    "weights": "Weights of the training examples",
    "suspects": "Suspects",
    "statuses": "What the statuses said",
    "reproduce": "How to reproduce",
}


class Checker(HTMLParser):
    """Every element is closed, and nothing is loaded from elsewhere."""

    VOID = ("meta", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        assert tag != "script"
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith("data:")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert not re.search(r"\b(none|nan|inf)\b", page.split("</style>")[1].lower())
    return checker


def test_a_tune_page_has_its_sections_and_numbers():
    page = render(saved_results.tune_result())
    found = check(page)
    names = ("baselines", "history", "penalties", "statuses", "reproduce")
    assert found.headings == [TITLES[name] for name in names]
    assert found.seen["circle"] == 8  # two charts of four steps
    assert found.seen["tr"] == 5
    text = html.unescape(page)
    assert "bilevel tune digits --out 'a b'" in text
    assert "0.0200 above the best baseline" in text
    assert "2e-05 at step 4" in text
    assert "1 step: the step budget ran out. Try more." in text
    assert "Seed 3, engine implicit; python 3.11, jax 0.10." in text


def test_a_clean_page_shows_suspects_as_images_where_the_data_are_known():
    saved = saved_results.clean_result()
    X = load_table("digits", None).X
    with_images, without = check(render(saved, X)), check(render(saved))
    assert TITLES["weights"] in without.headings and TITLES["suspects"] in without.headings
    assert TITLES["penalties"] not in without.headings
    assert with_images.seen["li"] == 24 and "li" not in without.seen
    assert without.seen["tr"] == 6 + 1 + len(saved.result["suspects"])
    first = saved.result["suspects"][0]
    assert f"{first['given']} → {first['predicted']}" in html.unescape(render(saved, X))


def test_every_section_can_be_missing():
    saved = saved_results.clean_result()
    optional = set(saved.result) - {"target"}
    for name in sorted(optional):
        rest = {key: value for key, value in saved.result.items() if key != name}
        check(render(Saved(rest, saved.arrays)))
        check(render(Saved(saved.result | {name: None}, saved.arrays)))
    arrays = {name: saved.arrays[name] for name in ("coef", "intercept", "features")}
    assert check(render(Saved({"target": "y"}, arrays))).headings == [TITLES["reproduce"]]


@pytest.mark.parametrize(
    "penalties",
    [
        {"<b>": 1e-3, "b": 0.1},
        [{"feature": "<b>", "penalty": 1e-3}, {"feature": "b", "penalty": 0.1}],
        [{"group": "<b>", "penalty": 1e-3}, {"group": "b", "penalty": 0.1}],
    ],
)
def test_penalties_by_name_are_bars_from_the_weakest(penalties):
    saved = saved_results.tune_result()
    saved.result["hyperparameters"] = {"level": 0.01, "penalties": penalties}
    page = render(saved)
    check(page)
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", page)]
    assert widths == [4, 100]
    assert page.count("&lt;b&gt;") == 2 and "<b>" not in page.split("<h2>Penalties")[1]


def test_names_from_files_are_escaped():
    evil = "<script>alert('x')</script>\"&"
    saved = saved_results.clean_result()
    result = json.loads(json.dumps(saved.result).replace('"digits"', json.dumps(evil)))
    result["target"] = result["verdict"] = result["task"] = evil
    result["versions"] = result["hyperparameters"]["exponents"] = {evil: 1.0}
    result["baselines"] = {evil: result["baselines"]["noisy"]}
    result["suspects"] = [{"row": 1, "given": evil, "predicted": evil, "weight": 0.1}]
    result["history"]["status"] = [evil] * 4
    result["history"]["advice"] = {evil: f"x: {evil}"}
    page = render(Saved(result, saved.arrays))
    check(page)
    assert page.count("&lt;script&gt;") >= 12


def test_an_interrupted_run_says_so():
    saved = saved_results.tune_result()
    assert "Interrupted" not in render(saved)
    assert "Interrupted" in render(Saved(saved.result | {"stopped": "interrupted"}, saved.arrays))


def test_line_charts_put_points_where_the_values_are():
    line = charts.line(
        [1.0, None, 100.0, math.nan], ["a"] * 4, [False, False, True, False], log=True
    )
    assert [(dot.x, dot.bad) for dot in line.dots] == [(70, False), (266, True)]
    assert [dot.y for dot in line.dots] == [charts.BOTTOM, charts.TOP]
    assert [tick.label for tick in line.y_ticks] == ["1", "10", "100"]
    flat = charts.line([5.0], ["a"], [False], log=False)
    assert charts.TOP < flat.dots[0].y < charts.BOTTOM
    near = charts.line([1e9, 1e9 + 1], ["a"] * 2, [False] * 2, log=False)
    assert len({tick.label for tick in near.y_ticks}) == len(near.y_ticks)


@pytest.mark.parametrize("log", [False, True])
def test_ticks_enclose_the_values_and_are_few(log):
    rng = np.random.default_rng(0)
    for low, span in zip(10 ** rng.uniform(-9, 9, 200), 10 ** rng.uniform(-6, 6, 200), strict=True):
        high = low * (1 + span)
        ticks = charts.log_ticks(low, high) if log else charts.linear_ticks(low, high)
        assert 2 <= len(ticks) <= 8
        assert ticks == sorted(ticks)
        assert ticks[0] <= low * (1 + 1e-9) and ticks[-1] >= high * (1 - 1e-9)


def test_a_histogram_counts_every_weight():
    weights = np.concatenate([np.full(30, 0.1), np.full(10, 0.9), [1.0, 0.5]])
    found = charts.histogram(weights, 0.5)
    counts = [int(bar.text.split()[0]) for bar in found.bars]
    assert sum(counts) == 42
    assert sum(count for count, bar in zip(counts, found.bars, strict=True) if bar.marked) == 30


def test_pixels_are_known_by_name_and_drawn_in_order():
    names = [f"pixel_{i}_{j}" for i in range(2) for j in range(3)]
    assert charts.pixel_shape(names) == (2, 3)
    for other in (names[::-1], names[:-1], [*names[:-1], "x"], ["a", "b"], []):
        assert charts.pixel_shape(other) is None
    found = charts.image(np.array([[0.0, 8.0], [16.0, 0.0]]), 0, 16)
    assert found.shades == [(0.5, "M1 0h1v1h-1z"), (1, "M0 1h1v1h-1z")]


def test_report_command_redraws_the_same_page(tmp_path, capsys):
    folder = saved_results.write(saved_results.clean_result(), tmp_path / "out")
    assert cli.main(["report", str(folder)]) == 0
    assert "written" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert page == render(saved_results.clean_result(), load_table("digits", None).X)
    check(page)
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == page
