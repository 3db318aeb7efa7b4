"""The page in a real browser, and the files beside it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urljoin

import pytest

from loraplus_hydra.report.page import page as page_of
from loraplus_hydra.report.results import results_of
from loraplus_hydra.report.write import write_report
from tests.support.finished_sweeps import loss_of, write_job, write_sweep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """
<script>
addEventListener("load", () => {
  const column = (at) => [...document.querySelectorAll("#table tbody tr")].map((row) => row.cells[at].dataset.sort);
  const heads = [...document.querySelectorAll("#table th")];
  const at = heads.findIndex((head) => head.textContent === "eval_loss");
  const before = column(at);
  heads[at].querySelector("button").click();
  const up = column(at);
  heads[at].querySelector("button").click();
  const down = column(at);
  const direction = heads[at].getAttribute("aria-sort");
  heads[0].querySelector("button").click();
  const folders = column(0);
  const filter = document.getElementById("filter");
  filter.value = "failed";
  filter.dispatchEvent(new Event("input"));
  const left = [...document.querySelectorAll("#table tbody tr")].filter((row) => row.offsetHeight > 0).length;
  const figures = [...document.querySelectorAll("figure svg")].map((svg) => {
    const box = svg.getBoundingClientRect();
    return [svg.closest("section").id, svg.classList[0], box.width, box.height, svg.querySelectorAll("path").length];
  }).filter((figure) => figure[2] > 0);
  const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const out = document.createElement("pre");
  out.id = "probe";
  const page = innerWidth;
  out.textContent = JSON.stringify({before, up, down, direction, folders, left, figures, requests, wide, page});
  document.body.append(out);
});
</script>
"""


FIGURES = ("heatmap", "ratio", "curves", "settings", "signals")


def opened(page: Path, profile: Path, width: int = 1280) -> tuple[str, str]:
    """Return the page's DOM after its scripts have run, and the browser's log."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
        f"--window-size={width},900",
        *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over both rates with its report; one job has failed."""
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(
        folder, name="grid", command="python -m loraplus_hydra -m ...", swept=["loraplus.lr_A", "loraplus.lr_B"]
    )
    rates = (1e-4, 5e-4, 2e-3)
    for place, (lr_A, lr_B) in enumerate((lr_A, lr_B) for lr_A in rates for lr_B in rates):
        job = {"loraplus.lr_A": lr_A, "loraplus.lr_B": lr_B}
        error = {"type": "NotFiniteError", "text": "<script>console.error('no')</script>"}
        failed: dict[str, Any] = {"status": "failed", "error": error} if place == 8 else {}
        write_job(folder / str(place), job, None if failed else loss_of(lr_A, lr_B), norms=True, **failed)
    write_report(folder)
    return folder


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_page_in_a_browser(folder: Path, tmp_path: Path) -> None:
    page = (folder / "report.html").read_text()
    dom, log = opened(folder / "report.html", tmp_path / "profile")
    assert "CONSOLE" not in log
    assert '<span id="shown" role="status">9 jobs</span>' in dom  # its policy lets its own script run
    probed = probe(page, tmp_path)
    numbers = [float(text) for text in probed["up"] if text]
    assert numbers == sorted(numbers)
    assert len(numbers) == 8
    assert probed["up"][-1] == probed["down"][-1] == ""  # the failed job comes last either way
    assert probed["down"][:-1] == probed["up"][:-1][::-1]
    assert probed["direction"] == "descending"
    assert probed["folders"] == [str(place) for place in range(9)]
    assert probed["left"] == 1
    assert [figure[:2] for figure in probed["figures"]] == [[name, "wide"] for name in FIGURES]
    assert all(width > 300 and height > 50 and paths > 10 for *_, width, height, paths in probed["figures"])
    assert probed["requests"] == []
    assert probed["wide"] <= 0
    # A phone: panels below each other, in figures that are higher than wide, and nothing beyond the page's edge
    probed = probe(page, tmp_path, width=390)
    assert probed["page"] <= 760
    assert [figure[:2] for figure in probed["figures"]] == [[name, "narrow"] for name in FIGURES]
    assert all(width <= probed["page"] - 40 and paths > 10 for *_, width, _, paths in probed["figures"])
    assert all(height > width for name, _, width, height, _ in probed["figures"] if name in ("curves", "signals"))
    assert probed["wide"] <= 0


def probe(page: str, folder: Path, width: int = 1280) -> Any:
    """Open the page in a window of `width` pixels. Return the findings of the script PROBE."""
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')  # it would block the probe
    copy = folder / "probed.html"
    copy.write_text(policy.sub("", page).replace("</body>", PROBE + "</body>"))
    dom, log = opened(copy, folder / "profile", width)
    assert "CONSOLE" not in log
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_live_page_runs_its_own_scripts_in_a_browser(tmp_path: Path) -> None:
    write_job(write_sweep(tmp_path / "sweep") / "0", {"loraplus.ratio": 4}, 3.6)
    results = results_of(tmp_path / "sweep")
    (tmp_path / "page.html").write_text(page_of(results, [], live=True))
    dom, log = opened(tmp_path / "page.html", tmp_path / "profile")
    assert "CONSOLE" not in log
    assert '<span id="shown" role="status">1 jobs</span>' in dom


def test_page_refers_to_nothing_but_the_files_beside_it(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    links = {link for link in re.findall(r'(?:src|href)="([^"#]+)"', page) if not link.startswith("data:")}
    assert "results.csv" in links
    jobs = {f"./{path.parent.name}/" for path in folder.glob("*/result.json")}
    assert jobs
    assert jobs <= links
    assert all((folder / link).is_file() for link in links - jobs)
    assert "url(http" not in page
    assert "default-src 'none'" in html.unescape(page)


def test_figures_beside_the_page_are_pictures(folder: Path) -> None:
    from PIL import Image

    for name in FIGURES:
        with Image.open(folder / f"{name}.png") as picture:
            picture.load()
            assert picture.width > 800
            colours = picture.convert("RGB").getcolors(maxcolors=1_000_000)
            assert colours is not None
            assert len(colours) > 20


ODD = ("a b", "c#d", "50%25", 'it\'s "q"', "e?f=1&g", "semi;colon", "\u00fc\u03bb", "<b>", "javascript:alert(1)")


def test_jobs_link_to_their_folders_whatever_the_names(tmp_path: Path) -> None:
    names = (*ODD, os.fsdecode(b"\xff"))  # the last is no text
    for place, name in enumerate(names):
        status = ("ok", "pruned", "failed")[place % 3]
        write_job(tmp_path / name, {"loraplus.ratio": place}, 3.5 if status == "ok" else None, status=status)
    text = page_of(results_of(tmp_path), [])
    links = [html.unescape(link) for link in re.findall(r'<a href="([^"]*)">', text)]
    for name in names:
        (link,) = {link for link in links if os.fsdecode(unquote_to_bytes(link)) == f"./{name}/"}
        assert urljoin("file:///sweep/report.html", link) == f"file:///sweep/{quote(os.fsencode(name), safe='')}/"


def test_states_of_jobs_are_told_apart_and_remedies_are_whole(tmp_path: Path) -> None:
    remedy = "\n".join(["2 errors in the config:", *(f"  key.{name}: {'long ' * 60}; use {name}" for name in "ab")])
    write_sweep(tmp_path)
    states = (("ok", 200), ("pruned", 6), ("pruned", 12), ("pruned", 6), ("interrupted", 9))
    for place, (status, at) in enumerate(states):
        curve = [(0, 5.0), (at, 4.0)]
        write_job(tmp_path / f"j{place}", {"loraplus.ratio": place + 1}, 3.6, status=status, curve=curve)
    for name in ("bad", "worse"):
        error = {"type": "ConfigErrors", "text": remedy}
        write_job(tmp_path / name, {"loraplus.ratio": 0}, None, status="failed", error=error)
    text = page_of(results_of(tmp_path), [])
    assert "7 jobs: 1 with a result, 3 left the search, 1 stopped, 2 failed" in text
    assert text.count(f'<div class="remedy">ConfigErrors: {remedy}</div>') == 1  # once for both jobs
    left = re.sub(r"<[^>]+>", " ", text[text.index('<section id="left">') :].partition("</section>")[0])
    assert re.findall(r"^ +(\d+) +(\d+) +(.*?) *$", left, re.MULTILINE) == [("6", "2", "j1 ,  j3"), ("12", "1", "j2")]
