"""Colours of the page and of its figures: texts have a contrast of at least 4.5 (WCAG 2) in both themes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

from loraplus_hydra.report import figures, page
from loraplus_hydra.report.figures import rates, style
from loraplus_hydra.report.results import SweepResults, results_of
from tests.support.finished_sweeps import loss_of, write_job

TEXT, SHAPE = 4.5, 3.0  # the smallest contrast of texts, and of lines and areas
CSS = (Path(page.__file__).parent / "templates" / "style.css.jinja").read_text()
# Each colour of texts, with the grounds on which the page has such texts.
TEXTS = {
    "ink": ("paper", "ground", "tint", "warm-tint"),
    "muted": ("paper", "ground"),
    "accent": ("paper", "ground", "tint", "warm-tint"),  # links in rows, and a status
    "warm": ("paper", "warm-tint", "ground"),
    "best": ("paper",),
}


def luminance(colour: Any) -> float:
    """Return the relative luminance of WCAG 2."""
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Any, other: Any) -> float:
    """Return the contrast of WCAG 2, from 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@cache
def themes() -> dict[str, dict[str, str]]:
    """Return the page's colours by theme and name."""
    blocks = re.findall(r":root \{([^}]*)\}", CSS)
    light, dark, paper = (dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in blocks)
    assert light.keys() == dark.keys()
    return {"light": light, "dark": dark, "print": light | paper}


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the standard's well-known near miss


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_texts_of_the_page_are_readable(theme: str) -> None:
    colours = themes()[theme]
    found = {(text, on): contrast(colours[text], colours[on]) for text, grounds in TEXTS.items() for on in grounds}
    assert {pair: value for pair, value in found.items() if value < TEXT} == {}
    # No other variable is the colour of a text
    assert set(re.findall(r"(?<![\w-])color: var\(--([\w-]+)\)", CSS)) <= TEXTS.keys()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepResults:
    """A sweep with all figures but that of the rungs; one job has failed."""
    folder = tmp_path_factory.mktemp("sweep")
    for place in range(36):
        lr, ratio, rank = 1e-4 * 2 ** (place % 4), (1, 4, 16)[place // 4 % 3], (4, 8, 16)[place // 12]
        failed = place == 30
        write_job(
            folder / str(place),
            {"optimizer.lr": lr, "loraplus.ratio": ratio, "adapter.r": rank},
            None if failed else loss_of(lr, lr * ratio) + 0.01 * rank,
            status="failed" if failed else "ok",
            norms=True,
        )
    return results_of(folder)


def texts_of(figure: Any) -> Iterator[Text]:
    """Yield the visible texts of a figure."""
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            yield text


@pytest.mark.parametrize("narrow", [False, True])
def test_texts_of_the_figures_are_readable_in_both_themes(sweep: SweepResults, narrow: bool) -> None:
    with matplotlib.rc_context(style.SETTINGS):
        drawn = list(figures.draw_all(sweep, narrow=narrow))
        for picture in drawn:
            picture.figure.canvas.draw()
    assert {picture.name for picture in drawn} == {*figures.NAMES} - {"rungs"}
    cells = 0
    for picture in drawn:
        for text in texts_of(picture.figure):
            colour = to_hex(text.get_color())
            if colour in ("#000000", "#ffffff"):  # on a cell, whose colour is the same in both themes
                cells += 1
                assert contrast(colour, ground_of(text)) >= TEXT, text.get_text()
                continue
            name = style._VARIABLES[colour]
            for theme in ("light", "dark"):
                colours = themes()[theme]
                assert contrast(colours[name], colours["paper"]) >= TEXT, (picture.name, text.get_text(), theme)
    assert cells >= 12


def ground_of(text: Text) -> Any:
    """Return the colour of the cell below a number."""
    x, y = text.get_position()
    (cell,) = (
        patch
        for patch in text.axes.patches
        if patch.get_zorder() == 1 and patch.get_x() < x < patch.get_x() + 1 and patch.get_y() < y < patch.get_y() + 1
    )
    return cell.get_facecolor()


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_numbers_are_readable_on_all_colours_of_the_heat_map(greater_is_better: bool) -> None:
    scale = rates._Scale(0.0, 1.0, greater_is_better)
    for place in range(1001):
        colour = scale.colour(place / 1000)
        assert contrast(scale.ink_on(place / 1000), colour) >= TEXT
        assert contrast(colour, themes()["dark"]["paper"]) >= SHAPE  # its darkest colour differs from a dark page


def test_ordered_lines_and_groups_are_visible_on_light_and_on_dark_pages() -> None:
    colours = [style.ordered_colour(place / 100) for place in range(101)]
    for theme in ("light", "dark"):
        known = themes()[theme]
        groups = [known[style._VARIABLES[one]] if one in style._VARIABLES else one for one in style.PALETTE]
        assert all(contrast(colour, known["paper"]) >= SHAPE for colour in (*colours, *groups)), theme


def test_colours_of_figures_on_the_page_follow_its_theme(sweep: SweepResults) -> None:
    with matplotlib.rc_context(style.SETTINGS):
        picture = next(figures.draw_all(sweep))
        text = style.svg(picture.figure, picture.title, "wide")
    assert not any(colour in text for colour in style._VARIABLES)
    assert "var(--ink)" in text
