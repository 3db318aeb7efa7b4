"""Chat template, end-of-text token and loss rule, from the tokenizer and the task's settings."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

from loraplus_hydra.errors import ConfigErrors, Problem, first_line
from loraplus_hydra.tasks.conversation import Shape
from loraplus_hydra.tasks.tokens import LossRule

_NO_TEMPLATE_FIX = (
    "use a model whose tokenizer has a template, or put chat_template.jinja into its folder; "
    "for task=sft also +task.args.chat_template_path=template.jinja"
)


def end_token(tokenizer: PreTrainedTokenizerBase, task: DictConfig) -> str:
    """Return the token that ends a text: `task.args.eos_token`, or the tokenizer's own.

    Raises ConfigErrors.
    """
    end = task.args.get("eos_token") or tokenizer.eos_token
    if end is None:
        what = "the tokenizer has no end-of-text token, so the model can't learn to stop"
        fix = "set one of its tokens: +task.args.eos_token='\"<|end|>\"'"
        raise ConfigErrors([Problem("model.tokenizer", what, fix)])
    if end not in tokenizer.get_vocab():
        raise ConfigErrors([Problem("task.args.eos_token", f"the tokenizer has no token '{end}'")])
    return str(end)


def set_template(tokenizer: PreTrainedTokenizerBase, task: DictConfig) -> None:
    """Set the tokenizer's template to `task.args.chat_template_path`, like the Trainer later.

    Raises ConfigErrors.
    """
    path = task.args.get("chat_template_path")
    if path is None:
        return
    if not Path(path).is_file() or Path(path).suffix not in (".jinja", ".j2"):
        fix = "use a file that ends in .jinja (another model's template may need tokens that this model doesn't have)"
        raise ConfigErrors([Problem("task.args.chat_template_path", f"there is no template file {path}", fix)])
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        what = f"{path} can't be read: {first_line(error)}"
        raise ConfigErrors([Problem("task.args.chat_template_path", what, "save it as UTF-8 text")]) from None


def check_template(tokenizer: PreTrainedTokenizerBase, shape: Shape, *, chat: bool | None) -> None:
    """Raise ConfigErrors if rows need a chat template, but there is none or it isn't used."""
    if shape.messages is not None and chat is False:
        what = "conversations need a chat template"
        raise ConfigErrors([Problem("task.chat", what, "task.chat=null")])
    if not tokenizer.chat_template and (chat or shape.messages is not None):
        why = "task.chat is true" if shape.messages is None else f"'{shape.messages}' has conversations"
        what = f"the tokenizer has no chat template, but {why}"
        raise ConfigErrors([Problem("model.tokenizer", what, _NO_TEMPLATE_FIX)])


def loss_rule(
    tokenizer: PreTrainedTokenizerBase, shape: Shape, task: DictConfig, *, chat: bool
) -> tuple[LossRule, list[str]]:
    """Return the rule that decides which tokens have loss, and notes for the user.

    Raises ConfigErrors.
    """
    completion_only = task.args.get("completion_only_loss")
    assistant_only = bool(task.args.get("assistant_only_loss", False))
    if completion_only and not shape.has_prompt:
        what = "the rows have no completion, only " + ("conversations" if shape.messages else "text")
        fix = "with null, completions have loss if the rows have completions, otherwise all tokens have loss; "
        fix += "for conversations use task.args.assistant_only_loss=true"
        raise ConfigErrors([Problem("task.args.completion_only_loss", what, fix)])
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
    """Return two values: a template that marks the assistant's turns, and a list of notes.

    The template is TRL's version, or None if the tokenizer's own template has marks. Raises ConfigErrors.
    """
    if not tokenizer.is_fast:
        raise ConfigErrors(
            [Problem(key, "only a fast tokenizer can find the assistant's tokens, and this one is slow")]
        )
    template, notes = None, []
    if not has_generation_markers(tokenizer.chat_template):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            what = "the tokenizer's chat template doesn't mark the assistant's turns, nor has TRL a version with marks"
            fix = "add {% generation %} ... {% endgeneration %} to a copy: +task.args.chat_template_path=template.jinja"
            raise ConfigErrors([Problem(key, what, fix)]) from None
        notes.append("TRL's training version of the tokenizer's chat template is used to find the assistant's turns.")
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        notes.append(
            "The chat template doesn't mark the end of the assistant's turns, so the model may not learn to stop."
        )
    return template, notes
