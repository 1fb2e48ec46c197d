"""``report.html`` stands alone, says the result truly, and escapes what it shows."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from results import statistic, summary
from stitchvm.core import OutputError, plots
from stitchvm.core.report import explanation, headline, write_report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would see: text, and everything it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def pictures(tmp_path):
    plots.recall_curve(summary()["retrieval"], tmp_path / "recall.png")
    return dict.fromkeys(("interface", "recall", "ranking", "steering", "samples"), tmp_path / "recall.png")


def test_the_page_needs_nothing_from_outside(tmp_path, pictures):
    html = write_report(tmp_path / "out", summary(), pictures).read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.loads) == 5
    for load in page.loads:
        kind, content = load.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content) == pictures["recall"].read_bytes()
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", rest)


def test_every_method_and_number_is_on_the_page(tmp_path, pictures):
    path = write_report(tmp_path, summary(), pictures)
    assert path == tmp_path / "report.html"
    text = Page(path.read_text(encoding="utf-8")).text
    for label in (*plots.METHODS.values(), *plots.ESTIMATORS.values(), "clean reward"):
        assert label in text
    for number in ("0.261 ± 0.005", "0.030 ± 0.003", "0.720 ± 0.070", "10,753", "2,304", "2,305", "1,344", "84.3%",
                   "75.1%", "89.1%", "37.2%", "0.660 ± 0.040", "0.990 ", "641", "642", "605.1", "3.11.2"):  # fmt: skip
        assert number in text, number
    assert "stitchvm quickstart --out out --seed 3" in text
    assert "after backbone block 3" in text
    assert "proposal window 0.1 to 0.4" in text


def test_everything_is_escaped(tmp_path, pictures):
    content = summary()
    nasty = '<script>alert("1")</script>'
    content["command"] = f"stitchvm quickstart --out '{nasty}'"
    content["pair"] = {"backbone": nasty, "reward": nasty}
    content["versions"] = {nasty: nasty}
    content["steering"]["settings"] = {nasty: nasty}
    content["search"]["criterion"] = nasty
    page = Page(write_report(tmp_path, content, pictures).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(nasty) == 12, "title, heading, explanation, settings and versions twice; criterion; command"


def test_what_is_missing_is_left_out(tmp_path):
    content = summary()
    for name in plots.METHODS:
        content["steering"][name]["detector"] = None
    del content["retrieval"]["vae"]
    del content["steering"]["best_of_n"]
    text = (page := Page(write_report(tmp_path, content, {}).read_text(encoding="utf-8"))).text
    assert "img" not in page.tags
    assert "best-of-N" not in text
    assert "FK, stitched 0.261 ± 0.005 0.030 ± 0.003 – 10,753" in text


@pytest.mark.parametrize(
    ("gain", "claim"),
    [
        (statistic(0.03, 0.003), "raises the reward by 0.030 ± 0.003 over 48 prompts"),
        (statistic(-0.03, 0.003), "lowers the reward by 0.030 ± 0.003 over 48 prompts"),
        (statistic(0.03, 0.02), "makes no clear difference to the reward over 48 prompts (0.030 ± 0.020)"),
        (statistic(0.03, None), "makes no clear difference"),
    ],
)
def test_the_headline_claims_no_more_than_was_measured(gain, claim):
    content = summary()
    content["steering"]["fk_stitched"]["gain"] = gain
    assert claim in headline(content)
    assert "it decodes 192 images in 62 s" in headline(content)
    assert "Tweedie (gain 0.032 ± 0.003) 1,344 in 82 s" in headline(content)
    del content["steering"]["fk_tweedie"]
    assert "Tweedie" not in headline(content)


def test_the_explanation_says_where_both_were_cut():
    text = explanation(summary())
    assert "shapes-mmdit was cut after backbone block 3, the reward model shapes-clip before its block 1" in text


def test_a_missing_picture_is_one_error_and_no_page(tmp_path):
    with pytest.raises(OutputError, match=r"none\.png"):
        write_report(tmp_path, summary(), {"recall": tmp_path / "none.png"})
    assert not list(tmp_path.iterdir())
