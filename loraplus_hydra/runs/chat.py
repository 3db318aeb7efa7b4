"""A conversation with a finished run's adapter in the terminal."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext

from transformers import PreTrainedTokenizerBase, TextStreamer

from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.streams import is_read
from loraplus_hydra.io.text import visible
from loraplus_hydra.models.initialisation import as_base
from loraplus_hydra.models.properties import table_size, trained_positions
from loraplus_hydra.runs.finished import FinishedRun
from loraplus_hydra.runs.load_finished import load_run
from loraplus_hydra.runs.predict import on_device, uses_chat
from loraplus_hydra.tasks.tokens import encode_prompt, render
from loraplus_hydra.training.sampling import Stopped, answer, sampling_arguments

_HELP = """/base         the base model's answer to the last message, without the adapter
/reset        forget the conversation
/system TEXT  set the system prompt, and forget the conversation
/quit         end (or Ctrl-D); Ctrl-C stops an answer"""
_NO_TEMPLATE = "The run was trained without a chat template, so each line is a prompt of its own."


class Chat:
    """A conversation: the model with its adapter, and the turns so far.

    Without a chat template, each message is a prompt of its own. Raises ConfigErrors for a classifier, and for a system
    prompt without a template.
    """

    def __init__(
        self, run: FinishedRun, *, system: str | None, max_new_tokens: int, temperature: float, top_p: float
    ) -> None:
        if str(run.config.task.task_type) == "SEQ_CLS":
            raise ConfigErrors([Problem("run", "a classifier gives labels and doesn't talk", "use predict")])
        model, self.tokenizer = load_run(run)
        self.model = on_device(model, run)
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling_arguments(temperature, top_p)
        self.has_template = uses_chat(run, self.tokenizer)
        if system is not None and not self.has_template:
            raise ConfigErrors([Problem("system", "the run was trained without a chat template", "leave it out")])
        table = table_size(self.model)
        self.context = table or trained_positions(run.config.model)
        self.turns: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forget the conversation. `system` replaces the system prompt; None keeps it."""
        if system is None and self.turns and self.turns[0]["role"] == "system":
            system = self.turns[0]["content"]
        self.turns = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, message: str) -> str:
        """Print the answer to a message while it is generated, and return it. Both become turns."""
        self.turns.append({"role": "user", "content": message})
        text = self._answer(self.turns)
        self.turns.append({"role": "assistant", "content": text})
        return text

    def ask_base(self) -> str | None:
        """Print and return the base model's answer to the last message; None if there is no message.

        The conversation stays as it is.
        """
        asked = [place for place, turn in enumerate(self.turns) if turn["role"] == "user"]
        return self._answer(self.turns[: asked[-1] + 1], base=True) if asked else None

    def _answer(self, turns: list[dict[str, str]], *, base: bool = False) -> str:
        prompt, room = self._prompt(turns)
        with as_base(self.model) if base else nullcontext():
            text = answer(
                self.model,
                self.tokenizer,
                prompt,
                room,
                special_tokens=not self.has_template,
                num_beams=1,  # only single answers can be shown while they are generated
                streamer=_Printer(self.tokenizer),
                stopping_criteria=[Stopped()],
                **self.sampling,
            )
        print(flush=True)
        return text or ""

    def _prompt(self, turns: list[dict[str, str]]) -> tuple[str, int]:
        """Return the prompt, and the number of tokens for the answer.

        Together they fit into the model's context. The oldest turns are left out, but a quarter of the context stays
        for the answer.
        """
        kept = list(turns)
        while True:
            prompt = render(kept, {}, self.tokenizer) if self.has_template else kept[-1]["content"]
            if self.context is None:
                return prompt, self.max_new_tokens
            length = len(encode_prompt(prompt, self.tokenizer, special_tokens=not self.has_template))
            room = max(self.context - length, min(self.max_new_tokens, self.context // 4))
            first = kept[0]["role"] == "system"  # the system prompt stays
            if length + room <= self.context or len(kept) <= first + 1:
                break
            del kept[first : first + 2]
        if len(kept) < len(turns):
            print(f"(The oldest {len(turns) - len(kept)} turns no longer fit into the model's context.)")
        if length + room > self.context:
            print(f"(This is longer than the model's context of {self.context:,} tokens.)")
        return prompt, min(self.max_new_tokens, room)

    def talk(self) -> None:
        """Answer the lines of stdin until it ends.

        The first Ctrl-C stops an answer. At the prompt, it ends the program.
        """
        print("/help lists the commands.")
        if not self.has_template:
            print(_NO_TEMPLATE)
        while is_read() and (line := self._next_line()) is not None and line != "/quit":
            with interrupts.notice("the answer ends here"):
                self._respond(line)
            if interrupts.requested() == interrupts.SIGNALS[0]:
                interrupts.forget()
            interrupts.stop_if_asked()

    def _next_line(self) -> str | None:
        """Return the next line of stdin; None at its end. With a template, spaces at its ends are removed."""
        interrupts.raise_at_once(True)  # while the program only waits
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except (OSError, ValueError, RuntimeError) as error:  # closed, or no longer readable
            raise UserError(f"stdin can't be read: {first_line(error)}") from None
        finally:
            interrupts.raise_at_once(False)
        # A byte that isn't UTF-8 becomes a lone surrogate, which tokenizers refuse
        line = line.encode("utf-8", "replace").decode("utf-8")
        return line.strip() if self.has_template or line.startswith("/") else line

    def _respond(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/base":
            if self.ask_base() is None:
                print("Write a message first.")
        elif command == "/reset":
            self.reset()
        elif command == "/system":
            if self.has_template:
                self.turns = []
                self.reset(rest or None)
            else:
                print(_NO_TEMPLATE)
        elif re.fullmatch(r"/\w*", command):
            print(_HELP)
        elif line.strip():
            try:
                self.ask(line)
            except UserError as error:  # the template refuses the turns
                self.turns.pop()
                print(visible(str(error)))


class _Printer(TextStreamer):
    """Prints the answer while it is generated, with control characters as escapes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(visible(text), end="", flush=True)
