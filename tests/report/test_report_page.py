"""The page in a real browser, and the files beside it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

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
    return [svg.closest("section").id, box.width, box.height, svg.querySelectorAll("path").length];
  });
  const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify({before, up, down, direction, folders, left, figures, requests, wide});
  document.body.append(out);
});
</script>
"""


def opened(page: Path, profile: Path) -> tuple[str, str]:
    """Return the page's DOM after its scripts have run, and the browser's log."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
        *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, done.stderr


def grid(folder: Path) -> Path:
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
def test_page_in_a_browser(tmp_path: Path) -> None:
    folder = grid(tmp_path / "sweep")
    page = (folder / "report.html").read_text()
    dom, log = opened(folder / "report.html", tmp_path / "profile")
    assert "CONSOLE" not in log
    assert '<span id="shown" role="status">9 jobs</span>' in dom  # its policy lets its own script run
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')  # it would block the probe
    copy = folder / "probed.html"
    copy.write_text(policy.sub("", page).replace("</body>", PROBE + "</body>"))
    dom, log = opened(copy, tmp_path / "profile")
    assert "CONSOLE" not in log
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None
    probed = json.loads(found[1])
    numbers = [float(text) for text in probed["up"] if text]
    assert numbers == sorted(numbers)
    assert len(numbers) == 8
    assert probed["up"][-1] == probed["down"][-1] == ""  # the failed job comes last either way
    assert probed["down"][:-1] == probed["up"][:-1][::-1]
    assert probed["direction"] == "descending"
    assert probed["folders"] == [str(place) for place in range(9)]
    assert probed["left"] == 1
    assert {figure[0] for figure in probed["figures"]} == {"heatmap", "ratio", "curves", "settings", "signals"}
    assert all(width > 300 and height > 50 and paths > 10 for _, width, height, paths in probed["figures"])
    assert probed["requests"] == []
    assert probed["wide"] <= 0


def test_page_refers_to_nothing_but_the_files_beside_it(tmp_path: Path) -> None:
    folder = grid(tmp_path / "sweep")
    page = (folder / "report.html").read_text()
    links = {link for link in re.findall(r'(?:src|href)="([^"#]+)"', page) if not link.startswith("data:")}
    assert "results.csv" in links
    jobs = {f"./{path.parent.name}/" for path in folder.glob("*/result.json")}
    assert jobs
    assert jobs <= links
    assert all((folder / link).is_file() for link in links - jobs)
    assert "url(http" not in page
    assert "default-src 'none'" in html.unescape(page)


def test_figures_beside_the_page_are_pictures(tmp_path: Path) -> None:
    from PIL import Image

    folder = grid(tmp_path / "sweep")
    for name in ("heatmap", "ratio", "curves", "settings", "signals"):
        with Image.open(folder / f"{name}.png") as picture:
            picture.load()
            assert picture.width > 800
            colours = picture.convert("RGB").getcolors(maxcolors=1_000_000)
            assert colours is not None
            assert len(colours) > 20
