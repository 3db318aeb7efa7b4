"""A tokenizer whose tokens are words, so that tokens can be counted by eye, and rows written as it sees them.

`<user> say one <end> <assistant> [one <end>]`: a space stands between tokens, and those in brackets carry loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.tiny import save_llama

if TYPE_CHECKING:  # imported where needed: every test module has these fixtures
    from transformers import PreTrainedTokenizerFast

    from loraplus_hydra.runs.preview import PreviewedRow

SPECIAL = ("<pad>", "<end>", "<begin>", "<system>", "<user>", "<assistant>", "<tool>")
WORDS = "say one two three the number after is a dog fox yes no and not call f x 1 2 tools: be brief"
# Calls are written as `call NAME KEY VALUE ...`, tools as `tools: NAME ...`.
TEMPLATE = (
    "{%- if tools -%}tools: {% for tool in tools %}{{ (tool.function or tool).name + ' ' }}{% endfor %}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<assistant> ' }}{%- generation -%}"
    "{{ (message['content'] + ' ') if message['content'] else '' }}"
    "{%- for each in message['tool_calls'] or [] -%}"
    "{{ 'call ' + each.function.name + ' ' }}"
    "{%- for key, value in each.function.arguments.items() -%}{{ key + ' ' + (value | string) + ' ' }}{%- endfor -%}"
    "{%- endfor -%}"
    "{{ '<end>' }}{%- endgeneration -%}{{ ' ' }}"
    "{%- else -%}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant> ' }}{%- endif -%}"
)


def word_tokenizer(template: str | None = TEMPLATE, adds: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return the tokenizer; it `adds` "bos" before a text, or "eos" after it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, "<unknown>", *WORDS.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin, end = ("<begin> " if "bos" in adds else ""), (" <end>" if "eos" in adds else "")
    special = [(token, vocabulary[token]) for token in ("<begin>", "<end>")]
    backend.post_processor = processors.TemplateProcessing(single=f"{begin}$A{end}", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        bos_token="<begin>",
        unk_token="<unknown>",
        extra_special_tokens=list(SPECIAL[3:]),
        model_max_length=64,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def written(ids: Iterable[int], labels: Iterable[int]) -> str:
    """Return the tokens of a row as text, with brackets around each run of tokens that carry loss."""
    tokenizer = word_tokenizer()
    tokens = list(zip(tokenizer.convert_ids_to_tokens(list(ids)), [label != -100 for label in labels], strict=True))
    return " ".join(_bracketed(tokens))


def previewed(row: PreviewedRow) -> str:
    """Return a row of `preview` as `written` does; its first token never carries loss."""
    return " ".join(_bracketed([(token.text, token.carries_loss) for token in row.tokens]))


def _bracketed(tokens: list[tuple[str, bool]]) -> Iterator[str]:
    for number, (token, learnt) in enumerate(tokens):
        before = number > 0 and tokens[number - 1][1]
        after = number + 1 < len(tokens) and tokens[number + 1][1]
        yield ("[" if learnt and not before else "") + token + ("]" if learnt and not after else "")


def written_rows(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return each row of input_ids and labels as `written` does."""
    return [written(row["input_ids"], row["labels"]) for row in rows]


@pytest.fixture(scope="session")
def words_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with the tokenizer of words and its chat template."""
    return save_llama(tmp_path_factory.mktemp("words"), word_tokenizer())


@pytest.fixture(scope="session")
def plain_words_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return save_llama(tmp_path_factory.mktemp("plain_words"), word_tokenizer(None))
