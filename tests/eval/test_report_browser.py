"""The report in headless Chromium, cut off from every network."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.eval.report_folder import bench_row, write_bench
from vtprune.eval.cli import app

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH"),
]
OFFLINE = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-gpu"]


@pytest.fixture(scope="module")
def report(tmp_path_factory, model_dir) -> Path:
    """The report of a small real sweep, with phases beside it."""
    out = tmp_path_factory.mktemp("reports") / "run"
    few = ("--strategy", "random,visionzip", "--keep", "50%,25%,12.5%", "--limit", "8")
    done = CliRunner().invoke(app, ["sweep", "--model", str(model_dir), *few, "--out", str(out)])
    assert done.exit_code == 0, done.output
    write_bench(out, rows=[bench_row("none", "100%"), bench_row("<b>x</b>", "64")])
    done = CliRunner().invoke(app, ["report", str(out), "--samples", "1,2"])
    assert done.exit_code == 0, done.output
    return out / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, report):
    """Opens the report, and collects what it says and asks for."""
    pages = []

    def open_it(width: int = 1280, scheme: str = "light", path: Path = report) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url.partition(":")[0]))
        page.goto(path.as_uri())
        page.wait_for_selector(".js-plotly-plot .point, .js-plotly-plot .points")
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        assert page.said == []  # no errors, and no other word
        assert set(page.asked) <= {"file", "data", "blob"}
        assert page.asked.count("file") == 1
        page.close()


def picture(place: Any, **options: Any) -> Image.Image:
    """A screenshot of a page or a part of it."""
    with Image.open(io.BytesIO(place.screenshot(**options))) as image:
        return image.convert("RGB")


def brightness(place: Any) -> float:
    return float(np.asarray(picture(place).convert("L")).mean())


@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_drawn_and_fits(opened, width):
    page = opened(width)
    assert page.locator(".js-plotly-plot").count() == 2  # the first axis, and the bars
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(picture(page, full_page=True).getcolors(1 << 24) or ()) > 500
    assert "vtprune sweep --model" in page.locator("pre").text_content()
    names = page.locator(".legendtext").all_text_contents()
    assert {"Pareto front", "random (baseline)", "visionzip", "encoder", "prefill"} <= set(names)
    assert "<b>x</b> 64" in page.locator(".yaxislayer-above text").all_text_contents()


def test_no_button_uploads(opened):
    titles = (
        opened()
        .locator("#s1-1-tokens .modebar-btn")
        .evaluate_all("buttons => buttons.map((button) => button.dataset.title)")
    )
    wanted = {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
    assert set(titles) == wanted


def test_light_and_dark(opened):
    light, dark = (brightness(opened(scheme=scheme)) for scheme in ("light", "dark"))
    assert light > 200 > 60 > dark


def test_the_slider_shows_another_budget(opened):
    page = opened()
    slider, output = page.get_by_label("Budget"), page.locator("output")
    shown = page.locator("[data-step]:visible")
    assert output.text_content() == "25%"
    assert shown.count() == 2 * 2
    before = shown.first.inner_html()
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert output.text_content() == slider.get_attribute("aria-valuetext") == "50%"
    assert [step.get_attribute("data-step") for step in shown.all()] == ["0"] * 4
    assert shown.first.inner_html() != before
    page.keyboard.press("End")
    assert output.text_content() == "12.5%"
    slider.fill("1")
    assert output.text_content() == "25%"
    assert shown.first.inner_html() == before


def test_overlays_dim_what_has_left(opened):
    page = opened()
    whole, random = page.locator("article svg"), page.locator("article [data-step]:visible svg")
    assert brightness(random.first) < 0.8 * brightness(whole.first)


def test_tabs_by_keyboard(opened):
    page = opened()
    tokens, flops = page.locator("#s1-1-tokens"), page.locator("#s1-1-FLOPs")
    page.get_by_role("radio", name="tokens").focus()
    page.keyboard.press("ArrowRight")
    flops.locator(".points").first.wait_for()
    assert flops.is_visible()
    assert not tokens.is_visible()
    assert "FLOPs" in flops.locator(".xtitle").text_content()
    page.keyboard.press("ArrowLeft")
    assert tokens.is_visible()


def test_hovering_says_the_figures(opened):
    page = opened()
    points = page.locator("#s1-1-tokens .trace.scatter").last.locator(".point")
    points.first.hover(force=True)
    label = page.locator("#s1-1-tokens .hoverlayer")
    label.locator("text").first.wait_for()
    said = " ".join(label.locator("text").all_text_contents())
    assert "visionzip 12.5%" in said
    assert "vs unpruned:" in said


def test_tables_sort(opened):
    page = opened()
    table = page.locator("table.sortable").first
    head = table.get_by_role("button", name="tokens")
    column = [cell.text_content() for cell in table.locator("thead th").all()].index("tokens") + 1
    cells = table.locator(f"tbody tr td:nth-child({column})")
    head.click()
    values = [float(text) for text in cells.all_text_contents()]
    assert values == sorted(values)
    assert values[0] < values[-1]
    head.press("Enter")
    values = [float(text) for text in cells.all_text_contents()]
    assert values == sorted(values, reverse=True)
    assert head.locator("xpath=..").get_attribute("aria-sort") == "descending"


def test_a_script_that_gets_in_does_not_run(browser, report, tmp_path):
    text = report.read_text(encoding="utf-8")
    bad = tmp_path / "bad.html"
    bad.write_text(text.replace("<h1>", "<script>document.title = 'broken'</script><h1>", 1))
    page = browser.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(bad.as_uri())
    assert page.title().startswith("vtprune report")
    assert any("Content Security Policy" in text for text in said)
    page.close()
