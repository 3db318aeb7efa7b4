"""What of a tokenizer and of the task's settings decides how turns are written, and which tokens carry loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.conversation import Shape
from loraplus_hydra.tasks.tokens import LossRule

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

_NO_TEMPLATE_FIX = "choose a model whose tokenizer has one, or give one: +task.args.chat_template_path=template.jinja"


def end_token(tokenizer: PreTrainedTokenizerBase, task: DictConfig) -> str:
    """What ends a text: the tokenizer's end-of-text token, unless `task.args.eos_token` names another."""
    end = task.args.get("eos_token") or tokenizer.eos_token
    if end is None:
        what = "it has no end-of-text token, so the model could not learn to stop"
        raise ConfigErrors(
            [Problem("model.tokenizer", what, "name one of its tokens: +task.args.eos_token='\"<|end|>\"'")]
        )
    if end not in tokenizer.get_vocab():
        raise ConfigErrors([Problem("task.args.eos_token", f"the tokenizer has no token '{end}'")])
    return str(end)


def take_template(tokenizer: PreTrainedTokenizerBase, task: DictConfig) -> None:
    """Give the tokenizer the template of `task.args.chat_template_path`, as the Trainer will."""
    path = task.args.get("chat_template_path")
    if path is None:
        return
    if not Path(path).is_file() or Path(path).suffix not in (".jinja", ".j2"):
        fix = "name a file that ends in .jinja (another model's template may need tokens that this model hasn't)"
        raise ConfigErrors([Problem("task.args.chat_template_path", f"there is no template file {path}", fix)])
    tokenizer.chat_template = Path(path).read_text(encoding="utf-8")


def check_template(tokenizer: PreTrainedTokenizerBase, shape: Shape, *, chat: bool | None) -> None:
    """Raise ConfigErrors if the rows need a chat template that isn't there, or that `task.chat` forbids."""
    if shape.messages is not None and chat is False:
        raise ConfigErrors(
            [Problem("task.chat", "conversations can't be written without a chat template", "task.chat=null")]
        )
    if not tokenizer.chat_template and (chat or shape.messages is not None):
        why = "task.chat is true" if shape.messages is None else f"'{shape.messages}' holds conversations"
        what = f"it has no chat template, but {why}"
        raise ConfigErrors([Problem("model.tokenizer", what, _NO_TEMPLATE_FIX)])


def loss_rule(
    tokenizer: PreTrainedTokenizerBase, shape: Shape, task: DictConfig, *, chat: bool
) -> tuple[LossRule, list[str]]:
    """Which tokens carry loss, and what the user should know of it."""
    completion_only = task.args.get("completion_only_loss")
    assistant_only = bool(task.args.get("assistant_only_loss", False))
    if completion_only and not shape.has_prompt:
        fix = "null: on completions where rows have them, on everything elsewhere; for conversations there is "
        what = "the rows have no completion, only " + ("conversations" if shape.messages else "text")
        raise ConfigErrors(
            [Problem("task.args.completion_only_loss", what, fix + "task.args.assistant_only_loss=true")]
        )
    if completion_only is None:
        completion_only = shape.has_prompt
    if not assistant_only:
        return LossRule(completion_only, assistant_only=False), []
    key = "task.args.assistant_only_loss"
    if shape.text is not None or (shape.messages is None and not chat):
        raise ConfigErrors([Problem(key, "plain texts have no turns of an assistant", "set it to false")])
    template, notes = _marked_template(tokenizer, key)
    return LossRule(completion_only, assistant_only=True, template=template), notes


def _marked_template(tokenizer: PreTrainedTokenizerBase, key: str) -> tuple[str | None, list[str]]:
    """A template that marks the assistant's turns, None if the tokenizer's own does; TRL knows those of many models."""
    from trl.chat_template_utils import (
        get_training_chat_template,
        has_generation_markers,
        is_chat_template_stop_token_trained,
    )

    if not tokenizer.is_fast:
        raise ConfigErrors([Problem(key, "the tokenizer isn't a fast one, so it can't tell which tokens are whose")])
    if has_generation_markers(tokenizer.chat_template):
        template, notes = None, []
    else:
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            what = (
                "the tokenizer's chat template doesn't mark the assistant's turns, and TRL has no marked version of it"
            )
            fix = "put {% generation %} ... {% endgeneration %} into it: +task.args.chat_template_path=template.jinja"
            raise ConfigErrors([Problem(key, what, fix)]) from None
        notes = ["The assistant's turns are found by TRL's training version of the tokenizer's chat template."]
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        notes.append(
            "The chat template doesn't mark the end of the assistant's turns: the model may not learn to stop."
        )
    return template, notes
