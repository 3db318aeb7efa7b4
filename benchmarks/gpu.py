"""A training step on one GPU in several ways; needs nothing but the GPU and this repository.

    python -m benchmarks.gpu [run=['batch 4']]

The model is random, made in a temporary folder: how fast a step is does not depend on the weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from benchmarks.step import measure_all
from loraplus_hydra.config.locations import model_location

INSTALLED = {"padding_free": is_flash_attn_2_available, "liger": is_liger_kernel_available}


def save_model(settings: DictConfig, folder: Path) -> None:
    """Write a Llama of random weights with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_location("pkg://loraplus_hydra.models/embedded"))
    tokenizer.save_pretrained(folder)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**OmegaConf.to_container(settings), **ids))  # type: ignore[arg-type]
    model.bfloat16().save_pretrained(folder)


def main() -> None:
    config = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(sys.argv[1:]))
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use")
    for way in [way for way in config.ways if way in INSTALLED and not INSTALLED[way]()]:
        print(f"{way}: left out, since its package is not installed")
        config.ways.remove(way)
    print(f"on {torch.cuda.get_device_name()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in config.models.items():
            save_model(settings, Path(folder) / name)
        torch.cuda.empty_cache()
        config.folder = folder
        measure_all(config)


if __name__ == "__main__":
    main()
