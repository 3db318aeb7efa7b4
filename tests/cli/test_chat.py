"""`chat`: a conversation with a finished run's adapter."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplus_hydra.runs import chat
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.job import run
from tests.conftest import Finished
from tests.support.finished_runs import finished

__all__ = ["finished"]
Talk = Callable[..., Finished]


@pytest.fixture
def talk(cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Give `lines` to the chat with `run`."""

    def talked(run: Path, lines: list[str], *overrides: str) -> Finished:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return cli("chat", str(run), "max_new_tokens=6", *overrides)

    return talked


def greedy(run: Path, seen: str, *, base: bool = False) -> str:
    """Return the likeliest six tokens after `seen`, by a loop written by hand over what PEFT loads."""
    model = AutoModelForCausalLM.from_pretrained(open_run(str(run)).config.model.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    if not base:
        model = PeftModel.from_pretrained(model, run / "adapter").eval()
    ids = tokenizer(seen, add_special_tokens=False, return_tensors="pt")["input_ids"]
    found = ids
    for _ in range(6):
        with torch.no_grad():
            best = model(input_ids=found).logits[:, -1].argmax(-1, keepdim=True)
        found = torch.cat([found, best], dim=1)
        if best.item() == tokenizer.eos_token_id:
            break
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_are_the_likeliest_tokens_after_the_whole_conversation(
    finished: Callable[[str], Path], talk: Talk
) -> None:
    run = finished("chat")
    first = greedy(run, "<system>be kind<user>say one<assistant>")
    second = greedy(run, f"<system>be kind<user>say one<assistant>{first}<user>say two<assistant>")
    of_base = greedy(run, f"<system>be kind<user>say one<assistant>{first}<user>say two<assistant>", base=True)
    anew = greedy(run, "<system>be kind<user>say two<assistant>")
    ended = talk(run, ["say one", "say two", "/base", "/reset", "say two", "/quit", "not read"], "system=be kind")
    assert ended.status == 0, ended.err
    assert ended.out == "/help lists the commands.\n" + "".join(f"{text}\n" for text in (first, second, of_base, anew))


def test_base_of_a_checkpoint_whose_start_changed_it_is_the_original_one(
    tiny_run: list[str], compose: Callable[..., Any], talk: Talk, tmp_path: Path
) -> None:
    words = ["adapter=pissa", "adapter.r=16", "optimizer.lr=2e-2", "trainer.save_steps=2", "task.samples=0"]
    run(compose(*tiny_run, *words), tmp_path / "run")
    of_base = greedy(tmp_path / "run", "say one", base=True)
    ended = talk(tmp_path / "run", ["say one", "/base", "say one"], "checkpoint=2")
    *_, first, base, second = ended.out.splitlines()
    assert (base, second) == (of_base, first)
    assert first != base, "training has changed the answer"


def test_oldest_turns_leave_a_conversation_that_is_too_long(
    finished: Callable[[str], Path], talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished("chat")
    monkeypatch.setattr(chat, "trained_positions", lambda _: 40)
    ended = talk(run, ["say one", "say two"], "system=be kind")
    assert "The oldest 2 turns no longer fit into the model's context." in ended.out
    alone = greedy(run, "<system>be kind<user>say two<assistant>")
    assert ended.out.endswith(f"{alone}\n")


def test_without_a_template_each_line_is_a_prompt_of_its_own(finished: Callable[[str], Path], talk: Talk) -> None:
    run = finished("sft")
    alone = talk(run, ["say two"])
    both = talk(run, ["say one", "say two", "/system be kind"])
    assert "each line is a prompt of its own" in alone.out
    assert alone.out.splitlines()[-1] in both.out
    assert both.out.count("trained without a chat template") == 2
    refused = talk(run, [], "system=be kind")
    assert refused.status == 1
    assert "- system: the run was trained without a chat template; leave it out" in refused.err


def test_ctrl_c_stops_an_answer_and_not_the_conversation(
    finished: Callable[[str], Path], talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, printed = chat._Printer.on_finalized_text, []

    def stopped(self: Any, text: str, stream_end: bool = False) -> None:
        shown(self, text, stream_end)
        printed.append(text)
        if len(printed) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat._Printer, "on_finalized_text", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = talk(finished("chat"), ["say one", "say two"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.status == 0
    assert "the answer ends here" in ended.err
    assert len(ended.out.splitlines()) == 3


def test_commands_are_listed_and_a_classifier_does_not_talk(finished: Callable[[str], Path], talk: Talk) -> None:
    ended = talk(finished("chat"), ["/base", "/what", "", "say \udcff"])
    assert ended.status == 0
    assert "Write a message first." in ended.out
    assert "/reset" in ended.out
    assert "/reset" not in talk(finished("chat"), ["/etc/hosts is a file"]).out
    refused = talk(finished("label"), ["hello"])
    assert refused.status == 1
    assert "use predict" in refused.err


def test_sampling_with_a_tiny_share_of_the_probability_is_greedy(finished: Callable[[str], Path], talk: Talk) -> None:
    run = finished("chat")
    sampled = [talk(run, ["say one"], "temperature=1.5", f"top_p={share}").out for share in ("1e-6", "1")]
    assert sampled[0] == talk(run, ["say one"]).out
    assert sampled[1] != sampled[0]
    refused = talk(run, [], "temperature=-1", "top_p=0")
    assert refused.status == 1
    assert "- temperature: -1.0 is out of range" in refused.err
    assert "- top_p: 0.0 is out of range; it must be a number above 0 and at most 1" in refused.err
