"""The report page: one file without outside resources, that shows samples, curves, neighbours, figures, the protocol and the training."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from torch import nn

from fastcm.evaluation.charts import axis, line_chart
from fastcm.evaluation.collectors import Gallery, Neighbours
from fastcm.evaluation.extractors import ModuleFeatures
from fastcm.evaluation.page import Facts, page
from fastcm.evaluation.protocol import evaluate
from fastcm.evaluation.samples import Samples


class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :6]


class Reader(HTMLParser):
    """Collects tags and pictures, and refuses tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.sources, self.texts = [], [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.sources += [value for name, value in given.items() if name in ("src", "href", "srcset", "action", "data")]
        if tag == "img":
            self.images.append(Image.open(io.BytesIO(base64.b64decode(given["src"].partition("base64,")[2]))))
        elif tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, size=(60, 1, 8, 8), dtype=np.uint8)
    samples = rng.integers(0, 256, size=(80, 1, 8, 8), dtype=np.uint8)
    samples[33] = data[7]
    labels = np.arange(80) % 3
    sets = [Samples(f"{n} steps", samples ^ n, labels, n) for n in (1, 2)]
    sets[0] = Samples("1 step <&>", samples, labels, 1)
    galleries = {}
    extractor = ModuleFeatures(Mean(), name="six pixels")
    result = evaluate(sets, data, None, extractor=extractor, metrics=("fid", "precision", "neighbours"), galleries=galleries)
    log = [{"nimg": i * 100, "loss": 5 / (i + 1)} for i in range(1500)] + [{"nimg": 5, "fd": 3.0}, {"nimg": 9, "loss": float("nan")}]
    facts = Facts("a <model>", galleries, data, ["zero", "one", "t&wo"], log)
    return result, facts, page(result, facts), samples, data


def test_the_page_is_whole_and_fetches_nothing(made):
    reader = Reader()
    reader.feed(made[2])
    assert not reader.open
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert not re.search(r"<script|@import|url\(|https?://", made[2])


def test_what_users_name_is_escaped(made):
    assert "a &lt;model&gt;" in made[2] and "1 step &lt;&amp;&gt;" in made[2] and "t&amp;wo" in made[2] and "<model>" not in made[2]


def test_the_samples_stand_in_the_columns_of_their_classes(made):
    _, facts, text, samples, _ = made
    gallery = facts.galleries["1 step <&>"][0]
    assert {label: rows.tolist() for label, rows in gallery.columns.items()} == {c: list(range(c, 18, 3)) for c in range(3)}
    reader = Reader()
    reader.feed(text)
    shown = [np.asarray(image) for image in reader.images]
    np.testing.assert_array_equal(shown[0], samples[0, 0])
    np.testing.assert_array_equal(shown[4], samples[4, 0])  # second row, second column


def test_neighbours_are_those_of_the_samples(made):
    result, facts, text, samples, data = made
    near = facts.galleries["1 step <&>"][1]
    assert near.closest[0][:2] == (0.0, 33) and near.index[33] == 7 and len(near.closest) == 10
    distances = np.sort(np.sqrt(((samples[:, None].astype(float) - data[None]) ** 2).mean((2, 3, 4))).min(axis=1))
    np.testing.assert_allclose([item[0] for item in near.closest], distances[:10], rtol=1e-9)
    reader = Reader()
    reader.feed(text)
    shown = [np.asarray(image) for image in reader.images][36:]  # after two grids of eighteen
    for place, (_, row, _) in enumerate(near.closest):
        np.testing.assert_array_equal(shown[place], samples[row, 0])
        np.testing.assert_array_equal(shown[10 + place], data[near.index[row], 0])
    assert f"<td>{distances[1]:.1f}</td>" in text and result["sets"][0]["neighbours"]["identical"] == 1


def test_the_curve_holds_every_set_with_its_error(made):
    result, _, text, _, _ = made
    charts = re.findall(r"<svg.*?</svg>", text)
    curve = ElementTree.fromstring(charts[0])
    assert curve.get("aria-label") == "FID [six pixels] by network calls"
    assert len(curve.findall("circle")) == 2 and len([p for p in curve.findall("path") if p.get("class") == "bar"]) == 2
    assert f"{result['sets'][1]['fid']['mean']:.2f} ± {result['sets'][1]['fid']['std']:.2f}" in text
    assert "FID [six pixels]" in text and result["protocol"]["reference_sha256"][:16] in text


def test_training_is_drawn_thinned_and_without_what_is_not_finite(made):
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", made[2])]
    (loss,) = [svg for svg in charts if svg.get("aria-label").startswith("training loss")]
    points = loss.find("polyline").get("points").split()
    assert 300 <= len(points) <= 401 and not any(svg.get("aria-label").startswith("Frechet") for svg in charts)


def test_without_pictures_and_log_there_are_figures_alone():
    data = np.random.default_rng(0).integers(0, 256, size=(30, 1, 8, 8), dtype=np.uint8)
    result = evaluate([Samples("set", data)], data, None, extractor=ModuleFeatures(Mean(), name="m"), metrics=("fid",))
    text = page(result, Facts("x", {}, None, None, []))
    assert "Training" not in text and "<img" not in text and "FID [m]" in text and "<svg" not in text


def test_charts_put_points_where_their_values_are():
    svg = ElementTree.fromstring(line_chart([(1, 10.0, 1.0), (3, 20.0, 0.0)], x_label="x", y_label="y", level=(15.0, "real"), whole_x=True))
    one, two = svg.findall("circle")
    level = next(line for line in svg.findall("line") if line.get("class") == "level")
    assert float(one.get("cx")) < float(two.get("cx")) and float(one.get("cy")) > float(two.get("cy"))
    assert float(level.get("y1")) == pytest.approx((float(one.get("cy")) + float(two.get("cy"))) / 2, abs=0.11)
    ticks = [text.text for text in svg.findall("text") if text.get("class") == "tick" and text.get("text-anchor") == "middle"]
    assert ticks == ["1", "3"]


def test_axes_are_logarithmic_over_wide_ranges_and_survive_one_value():
    wide = axis([0.01, 100.0], 0, 100, log=True)
    assert wide.ticks == (0.01, 0.1, 1.0, 10.0, 100.0)
    assert wide(1.0) == pytest.approx(50)
    flat = axis([2.0], 0, 100)
    assert flat(2.0) == pytest.approx(50) and flat.ticks
    assert line_chart([], x_label="x", y_label="y") == ""


def test_a_gallery_of_unlabelled_samples_has_columns_without_names():
    gallery = Gallery(Samples("s", np.zeros((25, 1, 4, 4), np.uint8)))
    assert len(gallery.columns) == 10 and not gallery.labelled
    near = Neighbours(Samples("s", np.zeros((1, 1, 4, 4), np.uint8)), np.zeros((2, 1, 4, 4), np.uint8), np.ones(2))
    assert near.closest == []
