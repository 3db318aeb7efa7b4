"""Ollama's TEMPLATE: a Go template that gives what the tokenizer's chat template gives."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loraplus_hydra.runs.ollama_template import translated
from tests.support.architectures import tokenizer
from tests.support.finished_runs import TEMPLATE

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' }}{{ m['content'] | trim }}"
    "{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
# No role for a system message, and another name for the assistant
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The system message is a part of the first user's turn
MISTRAL = (
    "{{ '<s>' }}{% set at = 0 %}{% if messages[0]['role'] == 'system' %}{% set at = 1 %}{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (messages[0]['content'] + '\n\n' if at and loop.index0 == 1 else '') "
    "+ m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
BRACES = "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] }}{% endfor %}{{ '{{assistant}}' }}"
# A single brace before each text, which Go would read as a part of the next action
BRACE = "{% for m in messages %}{{ '{' + m['role'] + '}{' + m['content'] + '}' }}{% endfor %}{{ '{assistant}{' }}"
# The number of the turn is in the text, so no text around the messages is the same
NUMBERED = "{% for m in messages %}{{ loop.index ~ ': ' ~ m['content'] ~ '\n' }}{% endfor %}"
# The system message is before the last question, as in the newest templates of Mistral
LAST = (
    "{% for m in messages if m['role'] != 'system' %}{{ '[' + ('S:' + messages[0]['content'] if loop.last and "
    "messages[0]['role'] == 'system' else '') + m['content'] + ']' }}{% endfor %}"
)
QUOTES = "{% for m in messages %}{{ '\"\"\"' + m['content'] }}{% endfor %}"


def with_template(template: str, **more: Any) -> PreTrainedTokenizerFast:
    made = tokenizer()
    made.chat_template = template
    for name, value in more.items():
        setattr(made, name, value)
    return made


def go(template: str, turns: list[tuple[str, str]]) -> str:
    """Execute the actions of Go's text/template that Ollama's own templates use, with what Ollama gives them."""
    system = "\n\n".join(text for role, text in turns if role == "system")
    tokens = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)

    def block(at: int, dot: dict[str, Any], out: list[str] | None) -> int:
        """Execute from `at` to the block's end or else; return its place. Without `out` nothing is written."""
        while at < len(tokens):
            action = tokens[at][2:-2].strip() if tokens[at].startswith("{{") else None
            if action is None:
                if out is not None:
                    out.append(tokens[at])
            elif action == "end" or action.startswith("else"):
                return at
            elif action == "range .Messages":
                end = at
                for role, text in turns or [("", "")]:
                    end = block(at + 1, {".Role": role, ".Content": text}, out)
                at = end
            elif action.startswith("if "):
                at = branch(at, dot, out)
            elif out is not None:
                out.append(action[1:-1] if action[0] == '"' else str(dot[action]))
            at += 1
        return at

    def branch(at: int, dot: dict[str, Any], out: list[str] | None) -> int:
        done = False
        while (action := tokens[at][2:-2].strip()) != "end":
            condition = action.removeprefix("else").strip().removeprefix("if").strip()
            held = not condition or (
                bool(dot[condition]) if condition[0] == "." else dot[".Role"] == condition.split('"')[1]
            )
            at = block(at + 1, dot, out if held and not done else None)
            done = done or held
        return at

    out: list[str] = []
    block(0, {".System": system}, out)
    return "".join(out)


@pytest.mark.parametrize(
    ("template", "system"),
    [
        (CHATML, True),
        (WITH_DEFAULT, True),
        (LLAMA_3, True),
        (GEMMA, False),
        (MISTRAL, True),
        (TEMPLATE, True),
        (BRACES, True),
        (BRACE, True),
    ],
    ids=["chatml", "with a default", "llama 3", "gemma", "mistral", "of the tests", "braces", "brace"],
)
def test_template_gives_the_prompt_of_the_tokenizer(template: str, system: bool) -> None:
    made = with_template(template, bos_token="<eos>")
    written = translated(made)
    assert written is not None
    names = ["user", "assistant"] * 3
    starts: list[list[tuple[str, str]]] = [[], [("system", "Be short.")]] if system else [[]]
    for start in starts:
        for length in (1, 3, 5):
            turns = [*start, *((role, f"turn {place}, {{ x }}") for place, role in enumerate(names[:length]))]
            messages = [{"role": role, "content": text} for role, text in turns]
            expected = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert go(written, turns) == expected, turns


@pytest.mark.parametrize("template", [NUMBERED, LAST, QUOTES], ids=["numbered", "before the last", "quotes"])
def test_template_that_ollama_cannot_have_is_none(template: str) -> None:
    assert translated(with_template(template)) is None


def test_token_that_the_tokenizer_adds_itself_is_left_out() -> None:
    from tokenizers.processors import TemplateProcessing

    made = with_template(LLAMA_3, bos_token="<eos>")
    assert (translated(made) or "").startswith("{{ if .System }}<eos>")
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    assert made("a").input_ids[0] == made.bos_token_id
    assert (translated(made) or "").startswith("{{ if .System }}<|start|>")
