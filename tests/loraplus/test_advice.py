"""Notes on settings that change the best rate."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loraplus_hydra.loraplus.advice import optimizer_note, setting_notes
from loraplus_hydra.loraplus.rules import TensorRecord


def lora_a(*modules: str) -> list[TensorRecord]:
    return [TensorRecord(f"layers.0.{name}.lora_A.default.weight", "lora_A", "Linear", (8, 16)) for name in modules]


@given(rows=st.integers(1, 4096), steps=st.none() | st.integers(1, 10_000), rank=st.sampled_from((1, 8, 64)))
def test_each_setting_that_is_off_has_one_note(rows: int, steps: int | None, rank: int) -> None:
    records = lora_a("self_attn.q_proj", "mlp.up_proj")
    notes = setting_notes(records, rows_per_step=rows, steps=steps, rank=rank)
    expected = [
        opening
        for opening, is_off in (
            (f"{rows} rows a step", rows > 32),
            (f"{steps} steps", steps is not None and steps < 100),
            (f"rank {rank}", rank != 8),
        )
        if is_off
    ]
    assert [note.split(":")[0] for note in notes] == expected
    assert all(note.count("LoRA Without Regret") == 1 for note in notes)


def test_lora_on_attention_alone_has_a_note() -> None:
    quiet = {"rows_per_step": 16, "steps": None, "rank": None}
    for only in (
        ["self_attn.q_proj", "self_attn.v_proj"],
        ["attention.self.query"],
        ["SelfAttention.q"],
        ["attn.c_attn"],
    ):
        assert [note.split(":")[0] for note in setting_notes(lora_a(*only), **quiet)] == ["LoRA is on attention alone"]
        assert setting_notes(lora_a(*only, "mlp.fc1"), **quiet) == []
    assert setting_notes([], **quiet) == []


def test_note_on_lora_fa_names_no_key_that_the_run_may_not_have() -> None:
    note = optimizer_note("LoraFA", [4e-4])
    assert "lora_B's rate counts, which is 0.0004" in note
    assert "loraplus." not in note  # loraplus=absolute has no ratio
