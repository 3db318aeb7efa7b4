"""Foreign text is harmless on the screen, in the log, in CSV, on the page and in Markdown."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from loraplus_hydra.io import screen
from loraplus_hydra.io.text import VisibleFormatter, code, code_block, csv_cell, json_line, markdown, one_line, visible
from tests.conftest import Finished

HOSTILE = "\x1b]0;title\x07 \x9b2J a\u202eb\r"


def test_control_characters_become_escapes() -> None:
    assert visible(HOSTILE) == r"\x1b]0;title\x07 \x9b2J a\u202eb\x0d"
    assert visible("two\r\nlines\tand a tab") == "two\nlines\tand a tab"
    assert one_line("two\nlines") == r"two\nlines"
    assert visible("déjà vu 😀 中") == "déjà vu 😀 中"


def test_json_has_control_characters_as_escapes() -> None:
    line = json_line({"a": HOSTILE + "\ud800\n é"})
    assert json.loads(line) == {"a": HOSTILE + "\ud800\n é"}
    assert line == visible(line)
    assert "é" in line


@pytest.mark.parametrize("text", ["=cmd|'calc'!A1", "+1", "-x", "@SUM(A1)", "\t=1"])
def test_no_cell_is_a_formula(text: str) -> None:
    assert csv_cell(text) == f"'{text}"
    assert csv_cell("plain = text") == "plain = text"


def test_markdown_shows_markup_literally() -> None:
    assert markdown("<b>*x*</b> [a](b) | _c_ eval_loss\nd") == (r"\<b\>\*x\*\</b\> \[a\](b) \| \_c\_ eval_loss d")
    assert code("a`b") == "``a`b``"
    assert code_block("```\nevil", "yaml") == "````yaml\n```\nevil\n````"


def test_log_records_and_tables_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.makeLogRecord({"msg": "a %s", "args": (HOSTILE,)})
    assert "\x1b" not in VisibleFormatter("%(message)s").format(record)
    screen.print_rich(screen.table([HOSTILE], [[HOSTILE]]))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.count("x1b") == 2


def test_report_of_a_hostile_sweep(cli: Callable[..., Finished], tmp_path: Path) -> None:
    job = tmp_path / "sweep" / "=cmd|'calc'!A1"
    job.mkdir(parents=True)
    error = {"type": "UserError", "text": f"<script>alert(1)</script>{HOSTILE}"}
    (job / "result.json").write_text(json.dumps({"status": "failed", "metric": "eval_loss", "error": error}))
    finished = cli("report", str(job.parent))
    assert finished.status == 0, finished.err
    assert "\x1b" not in finished.out + finished.err
    row = list(csv.reader(io.StringIO((job.parent / "results.csv").read_text())))[1]
    assert row[0] == "'=cmd|'calc'!A1"
    page = (job.parent / "report.html").read_text()
    assert "\x1b" not in page
    assert "<script>alert" not in page


def test_config_tree_shows_keys_with_brackets(caplog: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from loraplus_hydra.runs.display import show_config

    names = {"runs[/final].jsonl": 1, "rows[final].jsonl": 2, "end\\": 3}
    show_config(OmegaConf.create({"data": {"train": names}}))
    shown = capsys.readouterr().out
    assert "runs[/final].jsonl=1" in shown
    assert "rows[final].jsonl=2" in shown


SECRET = "https://me:s3cret@mlflow.acme.com/x"


def test_credentials_are_neither_on_the_screen_nor_in_the_log(caplog: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from loraplus_hydra.runs.display import show_config

    show_config(OmegaConf.create({"logger": {"tracking_uri": SECRET, "tags": [SECRET]}}))
    shown = capsys.readouterr().out
    assert "tracking_uri=https://mlflow.acme.com/x" in shown
    assert "s3cret" not in shown
    record = logging.makeLogRecord({"msg": "no answer from %s or %s", "args": (SECRET, "a@b.org")})
    assert VisibleFormatter("%(message)s").format(record) == "no answer from https://mlflow.acme.com/x or a@b.org"
