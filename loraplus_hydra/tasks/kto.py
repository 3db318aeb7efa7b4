"""Kahneman-Tversky optimisation: prompt, answer and whether it is a good one -> what TRL's KTOTrainer takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraplus_hydra.data.rows import all_columns, is_streamed
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.dpo import in_turns, rendered, turn
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.rows import batch_rows, described, require_columns, text_in, wrong_value

if TYPE_CHECKING:
    from datasets import DatasetDict
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt", "completion", "label")  # TRL's names; `data.<name>_column` maps others to them
VERDICTS = {"true": True, "1": True, "false": False, "0": False}  # as text too: CSV has nothing else


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    chat: bool | None = None,
) -> Examples:
    """Rows of judged answers as TRL's unpaired preferences; with a chat template each text becomes a turn.

    TRL takes the examples in their order, the same in each epoch, for it pairs those of a batch beforehand. So the
    training rows are shuffled here, by `data.seed`. Raises ConfigErrors.
    """
    if is_streamed(rows["train"]):
        what = "KTO needs its rows as a whole, to mix good answers and bad ones"
        raise ConfigErrors([Problem("data.streaming", what, "set data.streaming=false")])
    chat = in_turns(tokenizer, chat)
    names = {name: data.get(f"{name}_column") or name for name in COLUMNS}
    require_columns(rows, {f"data.{name}_column": column for name, column in names.items()})
    train, held_out = (_judged(rows[split], names, split, chat=chat) for split in ("train", "eval"))
    good = sum(train["label"])
    if good in (0, len(train)):
        what = (
            f"all {len(train)} training rows have the label {str(good > 0).lower()}, so there is nothing to tell apart"
        )
        raise ConfigErrors([Problem("data.label_column", what, "KTO learns from good answers and bad ones")])
    # Good answers alone are references to show.
    shown = rows["eval"].select([index for index, label in enumerate(held_out["label"]) if label][: task.samples])
    prompts = tuple(shown[names["prompt"]])
    return Examples(
        train=train.shuffle(seed=data.get("seed") or 0),
        eval=held_out,
        prompts=prompts,
        rendered=tuple(rendered(prompt, tokenizer, chat=chat) for prompt in prompts),
        references=tuple(shown[names["completion"]]),
        notes=(f"{good:,} good answers and {len(train) - good:,} bad ones to train on",),
    )


def config_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Return a Problem for batches of one row, since KTO's loss needs, for each prompt, the answer to another one."""
    task, rows = config["task"], config.get("trainer", {}).get("per_device_train_batch_size")
    # This loss alone compares no answers.
    alone = (task.get("args") or {}).get("loss_type") == "apo_zero_unpaired"
    if task.get("_target_") != "trl.KTOTrainer" or rows != 1 or alone:
        return []
    what = "KTO takes for each prompt of a batch the answer to another one, and a batch of one row has none"
    return [Problem("trainer.per_device_train_batch_size", what, "2 or more")]


def _judged(rows: Any, names: dict[str, str], split: str, *, chat: bool) -> Any:
    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for row, place in batch_rows(batch, indices, split):
            for name in ("prompt", "completion"):
                text = text_in(row, names[name], place, empty=False)
                found[name].append(turn(text, name) if chat else text)
            found["label"].append(_verdict(row[names["label"]], names["label"], place))
        return found

    return rows.map(convert, batched=True, with_indices=True, remove_columns=all_columns(rows))


def _verdict(value: Any, column: str, place: str) -> bool:
    verdict = VERDICTS.get(str(value).strip().lower())
    if verdict is None:
        raise wrong_value(place, column, f"is {described(value)}, not true or false", "true = a good answer")
    return verdict
