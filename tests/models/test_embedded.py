"""The embedded model: the files of its checkpoint, its training text, and the script that makes it."""

from __future__ import annotations

import ast
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from loraplus_hydra.data.embedded import load
from loraplus_hydra.data.embedded.source import is_held_out
from tools.embedded_model.card import Facts, model_card
from tools.embedded_model.pretrain import (
    CONTEXT,
    VOCABULARY,
    Corpus,
    main,
    new_model,
    read_corpus,
    train,
    train_tokenizer,
)
from tools.embedded_model.turns import CHAT_TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "loraplus_hydra" / "models" / "embedded"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True, dtype="float32")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus()


# --- the checkpoint's files ------------------------------------------------------------------------------------------


def test_the_checkpoint_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert set(sizes) == FILES
    assert sum(sizes.values()) <= 3_000_000


def test_no_file_names_a_machine_or_a_place() -> None:
    for name in FILES - {"model.safetensors"}:
        text = (CHECKPOINT / name).read_text(encoding="utf-8")
        assert "name_or_path" not in text, name
        if name != "tokenizer.json":  # whose vocabulary has pieces of paths that stand in the library
            assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|var|mnt)\b|[A-Z]:\\", text), name


def test_weights_are_float16() -> None:
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118
        assert set(weights.metadata() or {}) <= {"format"}


def test_the_shipped_card_is_the_one_that_the_script_writes() -> None:
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    shipped = Facts(
        steps=4500,
        seed=0,
        threads=2,
        seconds=1200,
        python="3.11.7",
        copyright=re.sub(
            "^    ", "", card[card.index("    Copyright") : card.index("\n\nThe Python")], flags=re.MULTILINE
        ),
        torch="2.13.0+cpu",
        transformers="5.23.0",
        modules=546,
        characters=6_800_000,
        held_out=62,
        turns=10_421,
        tokens=3_900_000,
        parameters=1_115_264,
        train_loss=2.08,
        held_out_loss=2.65,
        characters_a_token=3.18,
    )
    assert card == model_card(shipped)
    assert "python -m tools.embedded_model.pretrain --out FOLDER" in card


# --- the tokenizer ---------------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_one_token_each(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> None:
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (0, 1)
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer("<|user|>x = 1<|end|>")["input_ids"][::4] == [2, 1]


MESSAGES = [{"role": "user", "content": "def f(x):\n"}, {"role": "assistant", "content": "Return x."}]


def test_the_chat_template_renders_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert conversation == "<|user|>def f(x):\n<|end|><|assistant|>Return x.<|end|>"
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>def f(x):\n<|end|><|assistant|>"
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_the_prompt_with_its_generation_prompt_begins_the_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    """TRL finds the completion by this; it must hold for the tokens, not for the text alone."""
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    conversation = tokenizer.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]
    assert conversation[: len(prompt)] == prompt


def test_the_template_marks_the_assistants_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = tokenizer.apply_chat_template(MESSAGES * 2, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "Return x.<|end|>" * 2


def test_prompts_fit_the_context(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [
        len(tokenizer(row["prompt"])["input_ids"]) + len(tokenizer(row["completion"])["input_ids"]) + 4
        for row in load()["eval"]
    ]
    assert max(lengths) <= tokenizer.model_max_length


# --- what it was pretrained on ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_corpus_has_no_docstring(corpus: Corpus) -> None:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, text in corpus.modules.items():
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, holders)]
        assert not any(map(ast.get_docstring, nodes)), name


@pytest.mark.slow
def test_the_corpus_has_no_held_out_module(corpus: Corpus) -> None:
    assert corpus.held_out
    assert not any(is_held_out(name) for name in [*corpus.modules, *corpus.turns])
    assert all(is_held_out(name) for name in corpus.held_out)


@pytest.mark.slow
def test_turns_are_code_of_their_module_without_docstrings(corpus: Corpus) -> None:
    turns = corpus.turns["argparse"]
    lines = {line.strip() for line in corpus.modules["argparse"].split("\n")}
    assert len(turns) > 50
    for begun, rest in turns:
        # The first line may be the class's, without the comment that stands behind it.
        assert {line.strip() for line in f"{begun}\n{rest}".split("\n")[1:]} <= lines


# --- what it knows ---------------------------------------------------------------------------------------------------


def _loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=tokens[None], labels=tokens[None]).loss)


@pytest.mark.slow
def test_held_out_code_has_a_lower_loss_than_shuffled_code(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    tokens = torch.tensor(tokenizer(corpus.held_out["calendar"][:6000])["input_ids"][:512])
    shuffled = tokens[torch.randperm(512, generator=torch.Generator().manual_seed(0))]
    assert _loss(model, tokens) < 4.0 < _loss(model, shuffled)  # untrained: log(2048) = 7.6


def test_turn_tokens_are_trained(model: LlamaForCausalLM) -> None:
    """The library's source has none of these tokens: only the conversations in pretraining train them."""
    norms = model.get_input_embeddings().weight.detach().norm(dim=1)
    assert ((norms[1:4] / norms.median() > 0.5) & (norms[1:4] / norms.median() < 2)).all()


def test_a_turn_is_followed_by_an_answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer("<|user|>def area(width, height):\n    size = width * height<|end|>", return_tensors="pt")
    with torch.no_grad():
        following = model(**tokens).logits[0, -1].topk(2).indices.tolist()
    assert 3 in following  # <|assistant|>


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_trains_the_shipped_tokenizer_again(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    if f"CPython {platform.python_version()}:" not in card:
        pytest.skip("the library of another Python is another text")
    again = train_tokenizer(list(corpus.modules.values()))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.slow
def test_training_repeats_by_its_seed() -> None:
    texts = [[token % VOCABULARY for token in range(start, start + CONTEXT)] for start in range(0, 9000, 1000)]

    def trained(seed: int) -> torch.Tensor:
        torch.manual_seed(3)
        model = new_model()
        train(model, texts, steps=2, seed=seed)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


@pytest.mark.slow
def test_the_script_makes_the_same_checkpoint_twice(tmp_path: Path) -> None:
    """Both train one step, in separate processes with different hash seeds."""
    made = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        command = [sys.executable, "-m", "tools.embedded_model.pretrain", "--out", str(out), "--steps", "1"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        assert {path.name for path in out.iterdir()} == FILES
        assert str(tmp_path) not in (out / "README.md").read_text(encoding="utf-8")
        made.append({name: (out / name).read_bytes() for name in FILES - {"README.md"}})  # it has the seconds
    assert made[0] == made[1]


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--threads", "-1"], ["--steps", "many"]])
def test_wrong_arguments_are_refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
