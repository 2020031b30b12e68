"""The plot names every measured variant, and no name overlaps another."""

from __future__ import annotations

import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from slmops.contracts.evaluation import Evaluation
from slmops.contracts.profile import EDGE_SMALL
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.optimizer.domain.candidate import Variant
from slmops.optimizer.domain.choice import choose
from slmops.optimizer.domain.front import front
from slmops.optimizer.domain.gate import judge
from slmops.optimizer.domain.result import JobResult, ReferenceFigures
from slmops.optimizer.measure.labels import Named, place
from slmops.optimizer.measure.plot import draw


def variant(name: str, megabytes: float, kl: float, tokens_per_s: float = 80.0) -> Variant:
    evaluation = Evaluation(
        bytes=round(megabytes * 1e6),
        kl=kl,
        kl_low=kl * 0.9,
        kl_high=kl * 1.1,
        top1=0.8,
        ppl=16.0,
        reference_ppl=15.8,
        tokens_per_s=tokens_per_s,
        ttft_s=0.1,
        peak_rss_bytes=3 * 10**8,
    )
    definition = Recipe(name=name, passes=(PassSpec(pass_="build" if name.startswith("stock") else "quantize"),))
    verdict = judge(evaluation, EDGE_SMALL)
    return Variant(recipe=name, definition=definition, evaluation=evaluation, verdict=verdict, path="x", seconds=1.0)


def result(*variants: Variant) -> JobResult:
    return JobResult(
        reference=ReferenceFigures(
            architecture="llama", parameters=134_515_008, ppl=15.81, windows=6, window_tokens=256
        ),
        variants=variants,
        front=front(variants),
        choice=choose(variants, EDGE_SMALL),
        timings_s={},
    )


@pytest.fixture(scope="module")
def svg(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "front.svg"
    everything = result(
        variant("int8", 135, 0.005, 60),
        variant("int4", 94, 0.2),
        variant("stock-int4", 86, 0.46, 84),
        variant("exact", 519, 0.0, 31),
        variant("broken", 94, math.nan),
    )
    draw(everything, EDGE_SMALL, [path, path.with_suffix(".png")])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return path.read_text()


@pytest.mark.parametrize("name", ["int8", "int4", "stock-int4", "exact"])
def test_every_measured_variant_is_named_in_both_panels(svg, name):
    assert svg.count(f"<!-- {name} -->") == 2


@pytest.mark.parametrize(
    "text",
    [
        "Without figures: broken.",
        "perplexity 15.81 on 6 windows of 256 tokens",
        "Choice: int4: smallest of 2 that pass edge-small, 94 MB",
        "edge-small: KL 0.3",
        "edge-small: 160 MB",
        "stock builder, refused",
        "chosen",
    ],
)
def test_the_plot_contains_its_explanations(svg, text):
    assert text in svg


def test_the_same_result_gives_the_same_plot(tmp_path):
    paths = [tmp_path / name for name in ("a.svg", "b.svg", "a.png", "b.png")]
    draw(result(variant("int4", 94, 0.2)), EDGE_SMALL, paths)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[2].read_bytes() == paths[3].read_bytes()


def test_a_result_without_any_figure_can_be_drawn(tmp_path):
    picture = tmp_path / "front.png"
    draw(result(variant("broken", 94, math.nan)), EDGE_SMALL, [picture])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_names_of_crowded_points_overlap_neither_points_nor_names():
    figure = Figure(figsize=(8, 6), dpi=100)
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.set_xlim(70, 140)
    ax.set_ylim(0, 1)
    points = [
        Named(f"int4-g32-gptq-u{n}", 90 + n % 5, 0.3 + n * 0.02, 0.28 + n * 0.02, 0.32 + n * 0.02) for n in range(18)
    ]
    ax.plot([point.x for point in points], [point.y for point in points], "o")
    figure.draw_without_rendering()
    place(ax, points)
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert len(boxes) == len(points)
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert not any(box.contains(*ax.transData.transform((point.x, point.y))) for point in points)
