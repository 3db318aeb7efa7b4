"""Trials of one-step runs: what the check passes must train, whatever the config and the rows are.

As a script it runs the trials (see `forked`). A run checks its config first, and makes no folder if that has errors.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from loraplus_hydra.io.result import FAILED
from tests.fuzz.forked import Ended, command, trials
from tests.fuzz.test_fuzz_config import composed_keys, likely_overrides, overrides_of
from tests.fuzz.test_fuzz_data import OVERRIDES, spoilt
from tests.support.tiny import chat_tokenizer, save_bert, save_llama, word_tokenizer

SHORT = ("trainer.max_steps=1", "task.sample_tokens=2", "hydra.run.dir=run")
# What only training shows: the numbers, and the machine.
OF_TRAINING = ("isn't finite", "is not finite", "too little memory", "out of memory")


class Trials:
    """Tiny models for each task, and what is tried on them."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.work, self.overrides = folder / "work", overrides
        self.keys = composed_keys()
        llama = save_llama(folder / "llama", chat_tokenizer())
        bert = save_bert(folder / "bert", word_tokenizer())
        self.models = dict.fromkeys(OVERRIDES, llama) | {"classification": bert, "regression": bert}

    def one(self, number: int) -> dict[str, Any]:
        """Run one trial: a config at even numbers, a file of rows at odd ones."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        words = self._rows(number // 2) if number % 2 else self._config(number // 2)
        ended = command([*words, *SHORT], self.work)
        return {"words": [word[:300] for word in words], "status": ended.status, "fault": self._fault(ended)}

    def _config(self, number: int) -> list[str]:
        dice = random.Random(number)
        further = likely_overrides(number) if dice.random() < 0.7 else overrides_of(number, self.keys)
        return [*self.overrides, "task.samples=1", *further]

    def _rows(self, number: int) -> list[str]:
        example = spoilt(number)
        path = self.work / "rows" / example.name
        path.parent.mkdir()
        path.write_bytes(example.content)
        further = [text.replace("FILE", str(path)).replace("FOLDER", str(path.parent)) for text in example.overrides]
        rows = [f"data.train={path}", *([f"data.eval={path}"] * (len(example.content) % 2))]
        samples = (
            []
            if "task.samples" in str(further) or "classification" in str(OVERRIDES[example.task])
            else ["task.samples=1"]
        )
        return [
            "model=hub",
            f"model.path={self.models[example.task]}",
            *OVERRIDES[example.task],
            *further[:1],
            *rows,
            *further[1:],
            *samples,
        ]

    def _fault(self, ended: Ended) -> str:
        if fault := ended.fault():
            return fault
        result = self.work / "run" / "result.json"
        if ended.status == 0 or not result.exists():
            return ""
        stored = json.loads(result.read_text(encoding="utf-8"))
        assert stored["status"] == FAILED, stored
        if any(text in stored["error"]["text"] for text in OF_TRAINING):
            return ""
        return f"the check passed, and the run failed: {stored['error']}"


if __name__ == "__main__":
    trials(lambda folder, overrides: Trials(folder, overrides).one)
