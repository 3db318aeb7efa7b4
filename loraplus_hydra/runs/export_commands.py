"""Commands and files, beside the model's, that a target of `export` needs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loraplus_hydra.config.locations import is_local, model_location
from loraplus_hydra.io.files import copy_file, write_text
from loraplus_hydra.io.text import code_block
from loraplus_hydra.models.quantization import is_quantized
from loraplus_hydra.runs import ollama_template
from loraplus_hydra.runs.export_targets import HF, LLAMA_CPP, OLLAMA, TARGETS, VLLM, Export, smallest_max_lora_rank
from loraplus_hydra.runs.finished import FinishedRun
from loraplus_hydra.runs.predict import uses_chat

MODELFILE = "Modelfile"
LARGEST_NUM_CTX = 4096  # tokens; the memory of a context grows with its length, so a longer one is the user's choice
_QUANTISED = (
    "# The adapter was trained on a quantised base; on the full one its answers differ a little, merged they don't"
)
_CONVERTER = "python llama.cpp/convert_hf_to_gguf.py"
_ADAPTER_CONVERTER = "python llama.cpp/convert_lora_to_gguf.py"


@dataclass(frozen=True)
class Place:
    """The names of the export's folder and the base in commands."""

    folder: str
    base: str  # a local folder, or a name on the hub
    local: bool  # True if `base` is a folder


@dataclass(frozen=True)
class Served:
    """An export that its target can load."""

    target: str
    run: FinishedRun
    export: Export
    tokenizer: PreTrainedTokenizerBase
    sentencepiece: Path | None = None  # the tokenizer.model that the target needs

    def write(self, folder: Path) -> None:
        """Write the files that the target needs beside the model's."""
        if self.sentencepiece is not None:
            # Follows links, because the base's folder is the user's own
            copy_file(self.sentencepiece.resolve(), folder / self.sentencepiece.name)
        if self.target == OLLAMA:
            write_text(folder / MODELFILE, self.modelfile())

    def told(self, folder: Path) -> str:
        """Return the commands for this machine as a text for the screen; empty for Hugging Face's libraries."""
        location = model_location(self.run.config.model.path)
        lines = self.commands(Place(str(folder.absolute()), location, is_local(location)))
        return "\n".join([f"For {TARGETS[self.target]}:", *(f"  {line}" for line in lines)]) if lines else ""

    def section(self) -> str:
        """Return the card's section on the target, without local paths; empty for Hugging Face's libraries."""
        location = model_location(self.run.config.model.path)
        local = is_local(location)
        lines = self.commands(Place(".", Path(location).name if local else location, local))
        title = f"## How to run it with {TARGETS[self.target]}\n\nIn this folder:\n\n"
        return title + code_block("\n".join(lines), "bash") if lines else ""

    def commands(self, place: Place) -> list[str]:
        """Return the lines of shell that load the export into the target; comments begin with #."""
        if self.target == HF:
            return []
        lines = {VLLM: self._vllm, LLAMA_CPP: self._llama_cpp, OLLAMA: self._ollama}[self.target](place)
        note = is_quantized(self.run.config.quantization) and not self.export.merged
        return [*([_QUANTISED] if note else []), *lines]

    def modelfile(self) -> str:
        """Return Ollama's Modelfile. llama.cpp's converters write the GGUF files that it names."""
        merged = self.export.merged
        lines = [
            "# For `ollama create`; README.md has the commands that write the GGUF files",
            *(["FROM ./model.gguf"] if merged else ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]),
        ]
        template = ollama_template.translated(self.tokenizer) if self.chat else ollama_template.PLAIN
        assert template is not None, "check_target refuses a chat template that can't be translated"
        lines.append(f'TEMPLATE """{template}"""')
        end = self.tokenizer.eos_token
        lines += [f'PARAMETER stop "{end}"'] if end and '"' not in end and "\n" not in end else []
        if positions := self.export.base.get("max_position_embeddings"):
            lines.append(f"PARAMETER num_ctx {min(int(positions), LARGEST_NUM_CTX)}")
        return "\n".join(lines) + "\n"

    @property
    def chat(self) -> bool:
        """True if training turned plain prompts into turns."""
        return uses_chat(self.run, self.tokenizer)

    @property
    def name(self) -> str:
        """A name for the served model, of characters that every target takes."""
        base = Path(model_location(self.run.config.model.path)).name
        return (re.sub(r"[^a-z0-9._-]+", "-", base.lower()).strip("-._") or "model") + "-lora"

    @property
    def _template(self) -> str | None:
        """The file of the chat template, if the run didn't use the tokenizer's own."""
        path = self.run.config.task.args.get("chat_template_path")
        return None if path is None else str(path)

    def _vllm(self, place: Place) -> Iterator[str]:
        code = ["--trust-remote-code"] * bool(self.run.config.model.trust_remote_code)
        if self.export.merged:
            pooling = ["--runner", "pooling"] if self.export.task_type == "SEQ_CLS" else []
            yield _shell("vllm", "serve", place.folder, "--served-model-name", self.name, *pooling, *code)
            return
        revision = ["--revision", self.run.config.model.revision] if self.run.config.model.revision else []
        given = (self.run.config.model.tokenizer, self._template, self.run.config.task.args.get("eos_token"))
        # Otherwise vLLM would use the base's own tokenizer, with other turns or another end of an answer
        tokenizer = ["--tokenizer", place.folder] if any(given) else []
        named = f"{self.name}={place.folder}"
        if "=" in place.folder:
            named = json.dumps({"name": self.name, "path": place.folder})
        yield _shell(
            *("vllm", "serve", place.base, *revision, *tokenizer, *code),
            *(
                "--enable-lora",
                "--lora-modules",
                named,
                "--max-lora-rank",
                str(smallest_max_lora_rank(self.export.rank)),
            ),
        )

    def _llama_cpp(self, place: Place) -> Iterator[str]:
        yield from self._conversion(place)
        gguf = _inside(place, "model.gguf" if self.export.merged else "base.gguf")
        adapter = [] if self.export.merged else ["--lora", _inside(place, "adapter.gguf")]
        # llama-cli talks in the form of the chat template; without one, a text is continued.
        program = (
            ["llama-cli", "-m", gguf, *adapter] if self.chat else ["llama-completion", "-m", gguf, *adapter, "-no-cnv"]
        )
        if self.chat and self._template and not self.export.merged:  # base.gguf has the base's own template
            program += ["--jinja", "--chat-template-file", _inside(place, "chat_template.jinja")]
        yield _shell(*program, *([] if self.chat else ["-p", "Hello"]))

    def _ollama(self, place: Place) -> Iterator[str]:
        yield from self._conversion(place)
        yield _shell("ollama", "create", self.name, "-f", _inside(place, MODELFILE))
        yield _shell("ollama", "run", self.name)

    def _conversion(self, place: Place) -> Iterator[str]:
        """Yield the commands that convert the export, and for an adapter its base, to GGUF."""
        code = ["--trust-remote-code"] * bool(self.run.config.model.trust_remote_code)
        if self.export.merged:
            yield f"{_CONVERTER} {_shell(place.folder, '--outfile', _inside(place, 'model.gguf'), *code)}"
            return
        base = place.base if place.local else _inside(place, "base")
        if not place.local:
            revision = ["--revision", self.run.config.model.revision] if self.run.config.model.revision else []
            yield _shell("hf", "download", place.base, *revision, "--local-dir", base)
        yield f"{_CONVERTER} {_shell(base, '--outfile', _inside(place, 'base.gguf'), *code)}"
        adapter = _shell(place.folder, "--base", base, "--outfile", _inside(place, "adapter.gguf"), *code)
        yield f"{_ADAPTER_CONVERTER} {adapter}"


def _inside(place: Place, name: str) -> str:
    return name if place.folder == "." else str(Path(place.folder) / name)


def _shell(*words: str) -> str:
    return shlex.join(map(str, words))
