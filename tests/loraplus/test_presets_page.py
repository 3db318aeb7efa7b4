"""The table of presets in docs/explained/rates.md."""

from __future__ import annotations

from pathlib import Path

from loraplus_hydra.loraplus.grouping import first_match
from loraplus_hydra.loraplus.presets import preset_rules
from loraplus_hydra.loraplus.rules import ROLES, TensorRecord

# A record of each row of the table in docs/explained/rates.md: role, owner, shape, and whether it is of a new head
ROWS: dict[str, list[tuple[str, str, tuple[int, ...], bool]]] = {
    "`magnitude` of an embedding (DoRA)": [("magnitude", "Embedding", (64,), False)],
    "`lora_embedding_A`, `lora_embedding_B`": [
        (role, "Embedding", (8, 64), False) for role in ("lora_embedding_A", "lora_embedding_B")
    ],
    "any, in a new head: matrices": [("saved_module", "Linear", (3, 64), True)],
    "any, in a new head: vectors": [("bias", "Linear", (3,), True)],
    "`bias`, `norm`, `lora_B_bias`": [
        (role, "torch.nn.modules.normalization.LayerNorm", (64,), False) for role in ("bias", "norm", "lora_B_bias")
    ],
    "`magnitude` of another layer (DoRA)": [("magnitude", "Linear", (64,), False)],
    "`vera_b`": [("vera_b", "Linear", (64,), False)],
    "`vera_d`, other vectors": [(role, "Linear", (64,), False) for role in ("vera_d", "other")],
    "`lora_B`, `adalora_B`": [(role, "Linear", (64, 8), False) for role in ("lora_B", "adalora_B")],
    "`adalora_E`": [("adalora_E", "Linear", (8, 1), False)],
    "`lora_A`, `adalora_A`, `trainable_tokens`, `saved_module`, `other`": [
        (role, "Linear", (8, 64), False)
        for role in ("lora_A", "adalora_A", "trainable_tokens", "saved_module", "other")
    ],
}
IN_NAMES = {"adalora_B": "lora_B", "lora_B_bias": "lora_B.bias"}  # what PEFT calls them


def test_the_table_of_the_page_is_that_of_the_presets() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "explained" / "rates.md").read_text(encoding="utf-8")
    table = text.partition("## Presets")[2].partition("## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    (_, *presets), _, *shown = lines
    assert [role for role, *_ in shown] == list(ROWS)
    assert set(ROLES) <= {role for row in ROWS.values() for role, *_ in row}
    written = {1.0: "lr", 8.0: "lr x ratio", 2.0: "lr_A", 3.0: "lr_B", 4.0: "lr_embedding", 5.0: "lr_head"}
    of_peft = {"ratio": 8.0, "lr_embedding": 4.0}
    keys: dict[str, dict[str, float]] = {
        **dict.fromkeys(("default", "roles"), of_peft | {"lr_head": 5.0}),
        "absolute": {"lr_A": 2.0, "lr_B": 3.0, "lr_embedding": 4.0},
        "peft": of_peft,
        "none": {},
    }
    for role, *cells in shown:
        for name, cell in zip((one.strip("`") for one in presets), cells, strict=True):
            for each, owner, shape, head in ROWS[role]:
                record = TensorRecord(f"model.{IN_NAMES.get(each, each)}.default", each, owner, shape, new_head=head)
                (rule,) = first_match([record], preset_rules(name, lr=1, **keys[name]))
                assert written[rule.rate(1)] + "*" * (rule.weight_decay == 0) == cell, (role, name)
