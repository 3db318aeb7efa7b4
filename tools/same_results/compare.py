"""Show that two checkouts give the same results.

Run the same cases in both, and compare what they leave on disk.

    python tools/same_results/compare.py BEFORE AFTER --work FOLDER [--only NAME ...] [--side before] [--out FILE]

BEFORE and AFTER are checkouts; both run with the Python that runs this. What FOLDER has of a side is run again only if
the side's code has changed since. Prints a Markdown table; the exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from cases import CASES, RUN, Case, Side, run_side, versions
from safetensors import deserialize

# What a clock or the system's memory says, which no two runs agree on; and what names the code and not its outcome: the
# hash of the config, in which dotted paths of moved modules stand, and the versions.
NOT_COMPARED = frozenset(
    (
        *("seconds", "train_seconds", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
        *("tokens_per_second", "memory_bytes"),
        *("eval_model_preparation_time", "peak_memory_bytes", "config_hash", "versions"),
    )
)
# Keys of adapter_config.json that PEFT holds as sets, so that they are stored in any order.
SETS = frozenset(("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_to_transform"))
PATHS = frozenset(("base_model_name_or_path",))  # a folder inside the checkout
HASH = re.compile(r"(?<=_)[0-9a-f]{8}$")  # ends the name of a sweep's job: ratio-4_seed-1_3fa9c1d2
MOMENT = re.compile(r"\d{4}-\d\d-\d\d[_T ]\d\d-\d\d-\d\d|\d{4}-\d\d-\d\d|\d\d-\d\d-\d\d")
# What later versions write in addition: the base's config.json in a checkpoint, so that `predict` can open it, and the
# fingerprints of rows and weights in result.json
ADDED = re.compile(r"(^|/)checkpoints/checkpoint-\d+/config\.json$|(^|: )inputs$")
SHOWN = 3  # differences in a cell of the table; the others are counted

Items = Mapping[str, Any]  # what a reader finds in a folder: a name for each thing that is compared


@dataclass(frozen=True)
class Row:
    """Say how one kind of thing compares in one case."""

    case: str
    what: str
    differences: list[str]


def tensors(run: Path) -> Items:
    """Read each tensor of the adapter: its type, its shape and its bytes."""
    content: Any = deserialize((run / "adapter" / "adapter_model.safetensors").read_bytes())
    content.sort(key=lambda item: item[0])  # safetensors gives them in any order
    return {name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in content}


def metrics(run: Path) -> Items:
    """Read the lines of metrics.jsonl, without what a clock says."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {f"line {number}": json.dumps(_kept(json.loads(line))) for number, line in enumerate(lines, 1)}


def groups(run: Path) -> Items:
    """Read the entries of param_groups.json, each by its place and its tensor."""
    entries = json.loads((run / "param_groups.json").read_text(encoding="utf-8"))
    return {f"{number} {entry['name']}": json.dumps(entry) for number, entry in enumerate(entries)}


def adapter_config(run: Path) -> Items:
    """Read the keys of adapter_config.json: sets in order, no paths of this machine."""
    stored = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    ordered = {key: sorted(v) if key in SETS and isinstance(v, list) else v for key, v in stored.items()}
    return {key: json.dumps(value, sort_keys=True) for key, value in ordered.items() if key not in PATHS}


def result(run: Path) -> Items:
    """Read the keys of result.json but times, memory, hash and versions."""
    stored = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {key: json.dumps(value) for key, value in _kept(stored).items()}


def results_table(folder: Path) -> Items:
    """Read the rows of a sweep's results.csv, without seconds and without the hash in a job's name."""
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = [row | {"folder": plain(row["folder"])} for row in csv.DictReader(file)]
    return {f"row {number}": json.dumps(_kept(row)) for number, row in enumerate(rows, 1)}


def names(folder: Path) -> Items:
    """List the files in a folder; what Hydra keeps for itself isn't among them."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {plain(path.as_posix()): "" for path in files if ".hydra" not in path.parts}


def plain(name: str) -> str:
    """Write a relative name without hash, date and time."""
    return "/".join(MOMENT.sub("<time>", HASH.sub("<hash>", part)) for part in name.split("/"))


def _kept(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items() if key not in NOT_COMPARED}
    return [_kept(item) for item in value] if isinstance(value, list) else value


OF_A_RUN: dict[str, Callable[[Path], Items]] = {
    "tensors of the adapter, bit for bit": tensors,
    "lines of `metrics.jsonl`": metrics,
    "entries of `param_groups.json`": groups,
    "keys of `adapter_config.json`": adapter_config,
    "keys of `result.json`": result,
}


def compare_case(case: Case, work: Path) -> list[Row]:
    """Compare what the two sides have left of a case."""
    before, after = (work / side / case.name / RUN for side in ("before", "after"))
    readers: dict[str, Callable[[Path], Items]] = {"names of files": partial(_read, names)}
    if case.folder_key == "hydra.sweep.dir":
        readers["rows of `results.csv`"] = partial(_read, results_table)
    readers |= {what: partial(of_all_runs, reader) for what, reader in OF_A_RUN.items()}
    rows = []
    for what, read in readers.items():
        old, new = read(before), read(after)
        rows.append(Row(case.name, f"{len(old)} {what}", differences(old, new)))
    return rows


def of_all_runs(reader: Callable[[Path], Items], folder: Path) -> Items:
    """Read the same of each run in a folder; the name of a sweep's job stands ahead of what is read of it."""
    found: dict[str, Any] = {}
    for place in sorted(path.parent for path in folder.rglob("result.json")):
        job = plain(place.relative_to(folder).as_posix())
        prefix = "" if job == "." else f"{job}: "
        found |= {f"{prefix}{name}": value for name, value in _read(reader, place).items()}
    return found


def _read(reader: Callable[[Path], Items], folder: Path) -> Items:
    """Read a folder; a file that isn't there or has nothing in it is None, which equals nothing."""
    try:
        return reader(folder) or {reader.__name__: None}
    except FileNotFoundError as error:
        return {Path(error.filename).name: None}


def differences(before: Items, after: Items) -> list[str]:
    """Tell where two readings differ, in words; nothing to compare is a difference too."""
    if not before and not after:
        return ["there is nothing on either side"]
    after = {name: item for name, item in after.items() if name in before or not ADDED.search(name)}
    found = [f"{name}: only before" for name in before if name not in after]
    found += [f"{name}: only after" for name in after if name not in before]
    for name in (name for name in before if name in after):
        old, new = before[name], after[name]
        if old is None or new is None:
            found.append(f"{name}: isn't there or is empty")
        elif old != new:
            found.append(f"{name}: {_told(old, new)}")
    if not found and list(before) != list(after) and "" not in before.values():
        found.append("the order differs")
    return found


def _told(before: Any, after: Any) -> str:
    if isinstance(before, tuple):
        if before[:2] != after[:2]:
            return f"{before[:2]} before, {after[:2]} after"
        differing = sum(old != new for old, new in zip(before[2], after[2], strict=True))
        return f"{differing} of {len(before[2])} bytes differ"
    begin = next(index for index, (old, new) in enumerate(zip_longest(before, after)) if old != new)
    begin = max(0, begin - 40)
    return f"`…{before[begin : begin + 80]}…` before, `…{after[begin : begin + 80]}…` after"


def table(rows: list[Row]) -> str:
    """Write the comparison as a Markdown table."""
    lines = ["| case | compared | outcome |", "|---|---|---|"]
    for row in rows:
        told = "; ".join(islice(row.differences, SHOWN))
        if (more := len(row.differences) - SHOWN) > 0:
            told += f"; and {more} more"
        outcome = f"DIFFERS: {told}" if row.differences else "equal"
        lines.append(f"| {row.case} | {row.what} | {outcome.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def heading(sides: list[Side], threads: int) -> str:
    """Say what was compared, and by which versions, without paths of this machine."""
    said = "; ".join(f"{side.name}: {_commit(side.checkout)}" for side in sides)
    same = " (the very same code)" if len({side.code() for side in sides}) == 1 else ""
    libraries = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"{said}{same}. CPU, threads: {threads}; {libraries}."


def _commit(checkout: Path) -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--", "loraplus_hydra", "conf") else ""
    return (git("rev-parse", "--short", "HEAD") or "no commit") + changed


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, nargs="?", help="the other checkout; not needed with --side before")
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs and runs")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="these cases alone")
    parser.add_argument("--side", choices=["before", "after"], help="run this side alone and compare nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run; 1 by default")
    parser.add_argument("--out", type=Path, help="write the table into this file too")
    parsed = parser.parse_args()
    if parsed.after is None and parsed.side != "before":
        parser.error("name the checkout AFTER")
    return parsed


def main() -> int:
    """Run what is missing, compare, and return the exit status."""
    asked = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the run at hand is ended too
    places = {"before": asked.before, "after": asked.after}
    sides = [Side(name, place.resolve()) for name, place in places.items() if asked.side in (None, name)]
    cases = [case for case in CASES if asked.only is None or case.name in asked.only]
    work = asked.work.resolve()
    for side in sides:
        run_side(side, cases, work, asked.threads)
    if asked.side is not None:
        return 0
    rows = [row for case in cases for row in compare_case(case, work)]
    text = f"{heading(sides, asked.threads)}\n\n{table(rows)}\n"
    print(f"\n{text}", end="")
    if asked.out is not None:
        asked.out.write_text(text, encoding="utf-8")
    return int(any(row.differences for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
