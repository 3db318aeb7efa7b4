"""Ollama's TEMPLATE for a tokenizer's chat template.

Ollama fills Go templates and reads no Jinja. Most chat templates put a text before and after each message. These texts
are found by rendering short conversations. Then other conversations are rendered as well, and the TEMPLATE is used only
if it gives the same text for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from loraplus_hydra.errors import UserError
from loraplus_hydra.tasks.tokens import render

Turns = Sequence[tuple[str, str]]  # role and text

PLAIN = "{{ .Prompt }}"  # the prompt as it is, for a run that was trained without turns
_QUOTES = '"""'  # they end the TEMPLATE
_TEXTS = ("Kzq one", "Kzq two", "Kzq three", "Kzq four", "Kzq five", "Kzq six")  # in no chat template


@dataclass(frozen=True)
class _Parts:
    """The texts that a chat template puts around each message."""

    begin: str  # without a system message
    system: tuple[str, str] | None  # before and after the system message; None: the template takes none
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str  # before the answer

    def render(self, turns: Turns) -> str:
        """Return the prompt of a conversation as the TEMPLATE gives it."""
        text = self.begin
        if turns[0][0] == "system":
            assert self.system is not None
            text, turns = turns[0][1].join(self.system), turns[1:]
        return text + "".join(said.join(getattr(self, role)) for role, said in turns) + self.answer

    def template(self) -> str:
        """Return the TEMPLATE. Ollama joins all system messages, and gives the others with their roles."""
        begin = _literal(self.begin)
        if self.system is not None:
            begin = f"{{{{ if .System }}}}{_around('.System', self.system)}{{{{ else }}}}{begin}{{{{ end }}}}"
        user, assistant = _around(".Content", self.user), _around(".Content", self.assistant)
        turns = (
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}'
        )
        return begin + turns + _literal(self.answer)


def translated(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the TEMPLATE for the tokenizer's chat template; None if it can't be written as one."""
    parts = _parts(tokenizer)
    if parts is None:
        return None
    names = ["system"] if parts.system is not None else []
    for count in (1, 3, 5):
        roles = ["user", "assistant"] * (count // 2) + ["user"]
        for first in ([], names) if names else ([],):
            turns = list(zip(first + roles, _TEXTS, strict=False))
            if _rendered(turns, tokenizer) != parts.render(turns):
                return None
    template = parts.template()
    return None if _QUOTES in template else template


def _parts(tokenizer: PreTrainedTokenizerBase) -> _Parts | None:
    """Return the texts around the messages, as two short conversations show them."""
    one, two, three, *_ = _TEXTS
    short = _rendered([("user", one)], tokenizer)
    long = _rendered([("user", one), ("assistant", two), ("user", three)], tokenizer)
    if short is None or long is None or [short.count(one), *map(long.count, (one, two, three))] != [1] * 4:
        return None
    head, end = short.split(one)
    first, rest = long.split(one)
    middle, last = rest.split(two)
    again, tail = last.split(three)
    if first != head or tail != end:
        return None
    # The user's opening text is the longest that ends all texts before a user's message. What it leaves belongs to the
    # turn before. `end` and `middle` end the user's turn and begin an answer.
    system = _system(tokenizer, one, two)
    opening = _common_end([head, again] + ([system[1]] if system is not None else []))
    cut = len(opening)
    ends = None if system is None else (system[0], system[1][: len(system[1]) - cut])
    return _Parts(head[: len(head) - cut], ends, (opening, ""), (middle, again[: len(again) - cut]), end)


def _system(tokenizer: PreTrainedTokenizerBase, system: str, user: str) -> tuple[str, str] | None:
    """Return the texts before and after a system message, the second with the user's opening text."""
    text = _rendered([("system", system), ("user", user)], tokenizer)
    if text is None or text.count(system) != 1 or text.count(user) != 1 or text.index(system) > text.index(user):
        return None
    before, rest = text.split(system)
    return before, rest.split(user)[0]


def _rendered(turns: Turns, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the prompt of a conversation; None after an error.

    A first token that the tokenizer adds itself is removed, because llama.cpp adds it, too.
    """
    try:
        text = render([{"role": role, "content": said} for role, said in turns], {}, tokenizer)
    except UserError:  # many templates refuse a system message
        return None
    first = tokenizer.bos_token
    adds = first is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(first)) if adds else text


def _common_end(texts: Sequence[str]) -> str:
    """Return the longest text that ends all of `texts`."""
    shortest = min(texts, key=len)
    return next(
        shortest[start:] for start in range(len(shortest) + 1) if all(t.endswith(shortest[start:]) for t in texts)
    )


def _around(field: str, texts: tuple[str, str]) -> str:
    return f"{_literal(texts[0])}{{{{ {field} }}}}{_literal(texts[1])}"


def _literal(text: str) -> str:
    """Return `text` for a Go template, which would read `{{` as the beginning of an action.

    A brace at the end would become a part of the next action's beginning.
    """
    return re.sub(r"\{\{|\{\Z", lambda found: f'{{{{ "{found[0]}" }}}}', text)
