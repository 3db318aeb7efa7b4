"""`export target=...`: the files, the commands and the errors, on finished runs of tiny models."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import Finished
from tests.support.architectures import checkpoint
from tests.support.finished_runs import finished

__all__ = ["finished"]


@pytest.fixture
def export(finished: Callable[[str], Path], cli: Callable[..., Finished]) -> Callable[..., Finished]:
    def exported(run: str, *words: str) -> Finished:
        return cli("export", str(finished(run)), *words)

    return exported


def commands(out: str) -> list[list[str]]:
    return [shlex.split(line) for line in out.splitlines() if line.startswith("  ")]


def in_card(folder: Path, title: str) -> str:
    return (folder / "README.md").read_text().partition(f"## How to run it with {title}\n")[2].partition("\n## ")[0]


def test_vllm_gets_the_adapter_and_its_command(
    export: Callable[..., Finished], finished: Callable[[str], Path], tmp_path: Path
) -> None:
    ended = export("sft", "target=vllm", "to=a folder")
    assert ended.status == 0, ended.err
    base, folder = str(finished("sft").parent / "base"), str(Path("a folder").absolute())
    serve = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"base-lora={folder}", "--max-lora-rank", "8"]
    assert commands(ended.out) == [serve]
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in Path("a folder").iterdir()}
    card = in_card(Path("a folder"), "vLLM")
    assert "vllm serve base --enable-lora --lora-modules base-lora=. --max-lora-rank 8" in card
    assert str(tmp_path) not in card
    assert base not in card
    odd = export("sft", "target=vllm", "to='r=8'")
    assert f'{{"name": "base-lora", "path": "{Path("r=8").absolute()}"}}' in commands(odd.out)[0], "a = is JSON's"


def test_vllm_serves_a_merged_model_and_a_classifier(export: Callable[..., Finished]) -> None:
    ended = export("sft", "target=vllm", "merge=true", "to=model")
    assert commands(ended.out) == [["vllm", "serve", str(Path("model").absolute()), "--served-model-name", "base-lora"]]
    refused = export("label, causal", "target=vllm", "to=out")
    assert refused.status == 1
    assert (
        "target: vLLM can't load this adapter: it takes an adapter's classification head only for a base that has one"
        in refused.err
    )
    assert "use merge=true, which it can load" in refused.err
    assert not Path("out").exists()
    served = export("label, causal", "target=vllm", "merge=true", "to=out")
    assert served.status == 0, served.err
    assert commands(served.out)[0][-2:] == ["--runner", "pooling"]


def test_llama_cpp_gets_the_merged_model_and_two_commands(export: Callable[..., Finished]) -> None:
    ended = export("sft", "target=llama_cpp", "to=out")
    assert ended.status == 0, ended.err
    here = str(Path("out").absolute())
    convert, run = commands(ended.out)
    assert convert == ["python", "llama.cpp/convert_hf_to_gguf.py", here, "--outfile", f"{here}/model.gguf"]
    assert run == ["llama-completion", "-m", f"{here}/model.gguf", "-no-cnv", "-p", "Hello"], "trained without turns"
    assert not any("lora" in name for name in load_file("out/model.safetensors"))
    assert "convert_hf_to_gguf.py . --outfile model.gguf" in in_card(Path("out"), "llama.cpp")


def test_llama_cpp_converts_base_and_adapter(export: Callable[..., Finished], finished: Callable[[str], Path]) -> None:
    ended = export("chat", "target=llama_cpp", "merge=false", "to=out")
    assert ended.status == 0, ended.err
    here, base = str(Path("out").absolute()), str(finished("chat").parent / "base")
    of_base, of_adapter, run = commands(ended.out)
    assert of_base == ["python", "llama.cpp/convert_hf_to_gguf.py", base, "--outfile", f"{here}/base.gguf"]
    assert of_adapter[1:] == [
        *("llama.cpp/convert_lora_to_gguf.py", here, "--base", base, "--outfile", f"{here}/adapter.gguf")
    ]
    assert run == ["llama-cli", "-m", f"{here}/base.gguf", "--lora", f"{here}/adapter.gguf"]


@pytest.mark.parametrize("key", ["chat_template_path", "eos_token"])
def test_turns_and_ends_are_those_of_the_training(key: str, finished: Callable[[str], Path]) -> None:
    from loraplus_hydra.runs.export_check import check_target
    from loraplus_hydra.runs.export_commands import Place
    from loraplus_hydra.runs.finished import open_run

    run, place = open_run(str(finished("chat"))), Place("out", "owner/base", local=False)
    plain = check_target(run, "vllm", merged=False).commands(place)[-1]
    run.config.task.args[key] = "mine.jinja"
    (vllm,) = check_target(run, "vllm", merged=False).commands(place)
    assert vllm == plain.replace("owner/base", "owner/base --tokenizer out", 1), "else the base's own are used"
    template = " --jinja --chat-template-file out/chat_template.jinja" if key == "chat_template_path" else ""
    llama = check_target(run, "llama_cpp", merged=False).commands(place)[-1]
    assert llama == f"llama-cli -m out/base.gguf --lora out/adapter.gguf{template}"
    merged = check_target(run, "llama_cpp", merged=True).commands(place)[-1]
    assert merged == "llama-cli -m out/model.gguf", "the merged model has its own template"


def test_ollama_gets_a_modelfile(export: Callable[..., Finished]) -> None:
    ended = export("chat", "target=ollama", "to=out")
    assert ended.status == 0, ended.err
    assert [line[:2] for line in commands(ended.out)[1:]] == [["ollama", "create"], ["ollama", "run"]]
    assert commands(ended.out)[1][2:] == ["base-lora", "-f", f"{Path('out').absolute()}/Modelfile"]
    modelfile = Path("out/Modelfile").read_text()
    assert "\nFROM ./model.gguf\n" in modelfile
    assert 'PARAMETER stop "<eos>"\nPARAMETER num_ctx 128\n' in modelfile, "the tiny model reads 128 tokens"
    template = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    assert template is not None
    assert '{{ range .Messages }}{{ if eq .Role "user" }}<user>{{ .Content }}' in template[1]
    adapter = export("sft", "target=ollama", "merge=false", "to=adapter")
    assert adapter.status == 0, adapter.err
    text = Path("adapter/Modelfile").read_text()
    assert '\nFROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """{{ .Prompt }}"""\n' in text, "trained without turns"


def test_hub_base_is_downloaded_and_quantised_one_is_told(finished: Callable[[str], Path]) -> None:
    from loraplus_hydra.runs.export_check import check_target
    from loraplus_hydra.runs.export_commands import Place
    from loraplus_hydra.runs.finished import open_run

    run = open_run(str(finished("sft")))
    served = check_target(run, "llama_cpp", merged=False)
    run.config.model.revision = "v2"
    run.config.quantization = {"_target_": "transformers.BitsAndBytesConfig", "load_in_4bit": True}
    note, download, *rest = served.commands(Place(".", "owner/base", local=False))
    assert note.startswith("# The adapter was trained on a quantised base")
    assert download == "hf download owner/base --revision v2 --local-dir base"
    assert "convert_hf_to_gguf.py base --outfile base.gguf" in rest[0]
    vllm = check_target(run, "vllm", merged=False).commands(Place(".", "owner/base", local=False))
    assert "vllm serve owner/base --revision v2 --enable-lora" in vllm[1]


@pytest.mark.parametrize("linked", [False, True])
def test_tokenizer_model_is_added_where_the_converter_needs_it(
    linked: bool, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    from loraplus_hydra.errors import ConfigErrors
    from loraplus_hydra.runs.export_check import check_target
    from loraplus_hydra.runs.finished import open_run

    base = checkpoint("gemma", tmp_path / "gemma")
    run = open_run(str(finished("sft")), {"model": {"path": str(base)}})
    with pytest.raises(ConfigErrors, match=r"needs GemmaForCausalLM's tokenizer\.model, which the base doesn't have"):
        check_target(run, "llama_cpp", merged=True)
    place = tmp_path / "pieces" if linked else base / "tokenizer.model"
    place.write_bytes(b"pieces")
    if linked:
        (base / "tokenizer.model").symlink_to(place)
    (tmp_path / "out").mkdir()
    check_target(run, "llama_cpp", merged=True).write(tmp_path / "out")
    written = tmp_path / "out" / "tokenizer.model"
    assert (written.read_bytes(), written.is_symlink()) == (b"pieces", False)
    assert check_target(run, "vllm", merged=True).sentencepiece is None


def test_chat_template_that_ollama_cannot_have_is_refused(
    finished: Callable[[str], Path], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(finished("chat"), copied)
    numbered = "{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}"
    (copied / "adapter" / "chat_template.jinja").write_text(numbered)
    ended = cli("export", str(copied), "target=ollama", "to=out", "allow_changed_inputs=true")
    assert ended.status == 1
    assert "target: the tokenizer's chat template can't be written as a TEMPLATE of Ollama" in ended.err
    assert "use target=llama_cpp" in ended.err


def test_tokenizer_of_the_built_in_example_is_refused(export: Callable[..., Finished]) -> None:
    ended = export("sft", "target=llama_cpp", "model.path=pkg://loraplus_hydra.models/embedded", "to=out")
    assert ended.status == 1
    assert "pre-tokenizer was not recognized" in ended.err
    assert "use target=vllm merge=true" in ended.err
    assert not Path("out").exists()


def test_folders_have_the_names_of_target_and_kind(
    finished: Callable[[str], Path], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(finished("sft"), copied)
    for target in ("vllm", "hf"):
        ended = cli("export", str(copied), f"target={target}")
        assert ended.status == 0, ended.err
        assert (copied / "export" / f"{target}-adapter" / "adapter_model.safetensors").is_file()
    assert commands(ended.out) == [], "the card has the Python that loads it"


@pytest.mark.parametrize(("field", "value"), [("r", [8]), ("rank_pattern", [1]), ("modules_to_save", 3), ("r", None)])
def test_adapter_config_with_other_types_is_a_listed_error(
    field: str, value: object, finished: Callable[[str], Path], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(finished("sft"), copied)
    file = copied / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    ended = cli("export", str(copied), "target=vllm", "to=out", "allow_changed_inputs=true")
    assert ended.status == 1
    assert "adapter_config.json" in ended.err
    assert "Traceback" not in ended.err
    assert not Path("out").exists()


def test_wrong_target_is_told(export: Callable[..., Finished]) -> None:
    ended = export("sft", "target=llama.cpp", "dtype=int8")
    assert ended.status == 1
    assert "target: 'llama.cpp' is not a target (did you mean 'llama_cpp'?)" in ended.err
    assert "dtype: 'int8' is not a dtype" in ended.err
    assert "target: 'vLLM' is not a target (did you mean 'vllm'?)" in export("sft", "target=vLLM").err
    assert "`to` is the folder" in export("sft", "target=my_folder").err
    assert "dtype: an adapter keeps the dtype" in export("sft", "target=vllm", "dtype=bfloat16").err
