"""Rules that tell from a run's configs and tensor names what each target of `export` can load.

Sources of the limits: vLLM 0.33.0 (`lora/peft_helper.py`, `lora/lora_model.py`, `lora/utils.py`, `config/lora.py`);
llama.cpp's `convert_lora_to_gguf.py`, `convert_hf_to_gguf.py` and `llama-adapter.cpp` of October 2026; Ollama's page on
importing a model. docs/howto/export.md has them as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loraplus_hydra.errors import Problem, first_of
from loraplus_hydra.loraplus.peft_layers import LOFTQ
from loraplus_hydra.runs import export_architectures as known

KEY = "target"
HF, VLLM, LLAMA_CPP, OLLAMA = "hf", "vllm", "llama_cpp", "ollama"
TARGETS = {HF: "Hugging Face", VLLM: "vLLM", LLAMA_CPP: "llama.cpp", OLLAMA: "Ollama"}
MERGED_BY_DEFAULT = {None: True, HF: False, VLLM: False, LLAMA_CPP: True, OLLAMA: True}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM allows for max_lora_rank
VLLM_LARGEST_VOCABULARY = 258_048  # with LoRA on the output layer's path

# PEFT's names of methods without an update of the weights
_UNMERGEABLE = ("PROMPT", "P_TUNING", "PREFIX", "CPT", "CARTRIDGE", "XLORA", "SHADOW")
# Names of the embedding and of the output layer
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out"})
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_CHANGING_STARTS = ("pissa", "olora", "corda")  # values of init_lora_weights
# Fields of PEFT's LoraConfig that change what the adapter computes, and that neither vLLM nor llama.cpp implements
_FIELDS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of lora_B",
    "trainable_token_indices": "trained rows of single tokens",
    "target_parameters": "LoRA on parameters, such as those of experts",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "an adapter that begins at certain tokens (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "a router of adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}


@dataclass(frozen=True)
class Export:
    """The facts that decide whether a target can load an export."""

    merged: bool
    task_type: str | None
    architecture: str  # the model's class, LlamaForCausalLM; empty for code of its own
    base: Mapping[str, Any]  # the base's config.json
    adapter: Mapping[str, Any]  # adapter_config.json, as the export has it
    shapes: Mapping[str, tuple[int, ...]]  # of the adapter's tensors
    new_tokens: bool = False
    has_sentencepiece: bool = True  # the tokenizer has a tokenizer.model
    llama_cpp_tokenizer: bool = True  # False: a tokenizer that llama.cpp's converter doesn't know
    transformers_backend: bool = True  # vLLM can run the class through transformers' code

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The embedding and the output layer, as far as the adapter adapts or replaces them."""
        adapted = {_module(name) for name in self.shapes if name.endswith(_FACTORS)}
        return tuple(sorted((adapted | {*(self.adapter.get("modules_to_save") or ())}) & _EMBEDDINGS))

    @property
    def tied(self) -> bool:
        """True if the base's output layer is its embedding."""
        return bool(self.base.get("tie_word_embeddings"))

    @property
    def rank(self) -> int:
        """The largest rank of a LoRA layer."""
        return max([int(self.adapter["r"]), *map(int, (self.adapter.get("rank_pattern") or {}).values())])


Limit = Callable[[Export], Iterator[str]]


def problems(target: str, export: Export) -> list[Problem]:
    """Return a Problem for each reason why `target` can't load the export."""
    kind = "merged model" if export.merged else "adapter"
    found = [what for limit in _limits(target, export) for what in limit(export)]
    advice = _advice(target, export) if found else ""
    return [Problem(KEY, f"{TARGETS[target]} can't load this {kind}: {what}", advice) for what in found]


def smallest_max_lora_rank(rank: int) -> int:
    """Return the smallest value of vLLM's max_lora_rank for adapters of `rank`."""
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def _limits(target: str, export: Export) -> tuple[Limit, ...]:
    if export.merged:
        return {
            HF: (_unmergeable,),
            VLLM: (_unmergeable, _vllm_model),
            LLAMA_CPP: (_unmergeable, _no_text, _llama_cpp_model, _llama_cpp_tokenizer, _dropped_output),
            OLLAMA: (_unmergeable, _no_text, _llama_cpp_model, _llama_cpp_tokenizer, _dropped_output),
        }[target]
    if target == HF:
        return ()
    if export.adapter.get("peft_type") != "LORA":
        return (_other_method,)
    common = (_saved_modules, _unimplemented, _changed_base, _biases, _experts, _new_tokens, _other_tensors)
    if target == VLLM:
        return (_vllm_rank, *common, _vllm_adapted)
    if export.task_type != "CAUSAL_LM":
        return (_no_text,)
    return (_llama_cpp_model, _llama_cpp_tokenizer, *common, _llama_cpp_scale, _llama_cpp_adapted)


def _advice(target: str, export: Export) -> str:
    """Return the change after which the export can be loaded: first the other kind, then another target."""
    others = [name for name in (VLLM, LLAMA_CPP, OLLAMA, HF) if name != target]
    for name, merged in [(target, not export.merged), *((name, merged) for name in others for merged in (True, False))]:
        other = replace(export, merged=merged)
        if not any(list(limit(other)) for limit in _limits(name, other)):
            words = [f"target={name}"] * (name != target) + [f"merge={str(merged).lower()}"]
            return f"use {' '.join(words)}, which it can load" if name == target else f"use {' '.join(words)}"
    raise AssertionError("Hugging Face's libraries load every export")


def _module(name: str) -> str:
    """Return the last name of the layer that a tensor of the adapter belongs to."""
    path = name.split(".lora_")[0].split(".token_adapter")[0]
    return path.removesuffix(".weight").removesuffix(".bias").removesuffix(".base_layer").rpartition(".")[2]


def _unmergeable(export: Export) -> Iterator[str]:
    method = str(export.adapter.get("peft_type"))
    if any(part in method for part in _UNMERGEABLE):
        yield f"{method} has no update that can be merged into the weights"
    if export.adapter.get("lora_bias"):
        yield "PEFT merges the bias of a lora_B only into layers that have a bias (lora_bias)"


def _other_method(export: Export) -> Iterator[str]:
    yield f"it loads adapters of LoRA only, and this one is {export.adapter.get('peft_type')}"


def _no_text(export: Export) -> Iterator[str]:
    if export.task_type != "CAUSAL_LM":
        yield f"only models that continue text are converted, and the task is {export.task_type}"


# --- rules for the adapters of vLLM and llama.cpp


def _saved_modules(export: Export) -> Iterator[str]:
    if export.task_type == "SEQ_CLS":
        yield "it takes an adapter's classification head only for a base that has one"
    elif saved := export.adapter.get("modules_to_save"):
        yield f"it loads no trained copies of whole layers (modules_to_save: {', '.join(saved)})"


def _unimplemented(export: Export) -> Iterator[str]:
    for name, what in _FIELDS.items():
        if export.adapter.get(name):
            yield f"it doesn't support {what} ({name})"


def _changed_base(export: Export) -> Iterator[str]:
    start = str(export.adapter.get("init_lora_weights")).lower()
    if start == LOFTQ:
        yield f"the adapter fits only the base as it was quantised for training (init_lora_weights={start})"
    elif start.startswith(_CHANGING_STARTS):
        yield f"the adapter fits only a base that its start changed (init_lora_weights={start})"


def _biases(export: Export) -> Iterator[str]:
    if (bias := export.adapter.get("bias") or "none") != "none":
        yield f"it loads no trained biases (bias={bias})"


def _experts(export: Export) -> Iterator[str]:
    if any(".experts." in name for name in export.shapes) and not export.adapter.get("target_parameters"):
        yield "LoRA on the experts of a mixture has another layout there"


def _new_tokens(export: Export) -> Iterator[str]:
    if export.new_tokens and not export.adapter.get("trainable_token_indices"):
        yield "an adapter can't add tokens to its base (model.add_tokens)"


def _other_tensors(export: Export) -> Iterator[str]:
    """Name tensors that no other rule explains."""
    saved = tuple(export.adapter.get("modules_to_save") or ())
    if (export.adapter.get("bias") or "none") != "none" or any(export.adapter.get(name) for name in _FIELDS):
        return
    others = [name for name in export.shapes if not name.endswith(_FACTORS) and _module(name) not in saved]
    if others and export.task_type != "SEQ_CLS":
        yield f"it loads no tensors but lora_A and lora_B, and this one also has {first_of(others, 2)}"


# --- vLLM


def _vllm_rank(export: Export) -> Iterator[str]:
    if export.rank > VLLM_RANKS[-1]:
        yield f"its largest max_lora_rank is {VLLM_RANKS[-1]}, and the adapter has rank {export.rank}"


def _vllm_adapted(export: Export) -> Iterator[str]:
    name = export.architecture
    if name in known.VLLM_WITHOUT_LORA:
        yield f"its {name} doesn't support LoRA"
    elif name and name not in known.VLLM_WITH_LORA and not export.transformers_backend:
        yield f"it has no {name}, and transformers' code for it doesn't suit vLLM"
    allowed = known.vllm_embeddings(name)
    for layer in export.embeddings:
        if name and layer not in {*allowed, *(export.adapter.get("modules_to_save") or ())}:
            yield f"its {name} takes no LoRA on {layer}"
    # vLLM prepares the output layer of these architectures for LoRA, even if the adapter leaves it unchanged.
    size = int(export.base.get("vocab_size") or 0)
    if "lm_head" in allowed and size > VLLM_LARGEST_VOCABULARY:
        yield f"with LoRA, its largest vocabulary is {VLLM_LARGEST_VOCABULARY:,}, and the base has {size:,} tokens"


def _vllm_model(export: Export) -> Iterator[str]:
    name = export.architecture
    own = known.VLLM_WITH_LORA | known.VLLM_WITHOUT_LORA | known.VLLM_CLASSIFIERS
    as_causal = name.replace("ForSequenceClassification", "ForCausalLM")  # vLLM adapts its causal models
    if export.task_type not in ("CAUSAL_LM", "SEQ_CLS"):
        yield f"it serves models that continue text and classifiers, and the task is {export.task_type}"
    elif name and not {name, as_causal} & own and not export.transformers_backend:
        yield f"it has no {name}, and transformers' code for it doesn't suit vLLM"


# --- llama.cpp, and Ollama, which runs llama.cpp


def _llama_cpp_model(export: Export) -> Iterator[str]:
    name = export.architecture
    if export.task_type == "CAUSAL_LM" and name and name not in known.LLAMA_CPP:
        yield f"llama.cpp's converter doesn't know {name}"
    key = known.LLAMA_CPP_KEYS.get(name)
    if key is not None and key not in export.base:
        yield f"llama.cpp's converter needs '{key}' in {name}'s config.json, which the base doesn't have"


def _llama_cpp_tokenizer(export: Export) -> Iterator[str]:
    if not export.llama_cpp_tokenizer:
        yield (
            "llama.cpp's converter knows byte-level tokenizers by a hash, and not the one of this model ('BPE "
            "pre-tokenizer was not recognized')"
        )
    if export.architecture not in known.LLAMA_CPP_SENTENCEPIECE:
        return
    if not export.has_sentencepiece:
        yield f"llama.cpp's converter needs {export.architecture}'s tokenizer.model, which the base doesn't have"
    elif export.new_tokens:
        yield f"llama.cpp's converter reads {export.architecture}'s tokens from tokenizer.model, without the new ones"


def _dropped_output(export: Export) -> Iterator[str]:
    if export.architecture in known.LLAMA_CPP_ALWAYS_TIED and export.embeddings:
        yield (
            f"llama.cpp uses {export.architecture}'s embedding as the output layer, and the adapter changed "
            f"{' and '.join(export.embeddings)}"
        )


def _llama_cpp_scale(export: Export) -> Iterator[str]:
    if export.adapter.get("use_rslora"):
        yield "llama.cpp scales an adapter by lora_alpha / r, and rsLoRA by lora_alpha / sqrt(r)"
    if export.adapter.get("alpha_pattern"):
        yield "llama.cpp has one lora_alpha for all layers (alpha_pattern)"


def _llama_cpp_adapted(export: Export) -> Iterator[str]:
    name = export.architecture
    if export.task_type == "CAUSAL_LM" and name in known.LLAMA_CPP - known.LLAMA_CPP_ADAPTERS:
        yield f"it isn't known that llama.cpp adapts all layers of {name}"
    if export.embeddings and (export.tied or export.architecture in known.LLAMA_CPP_ALWAYS_TIED):
        yield f"embedding and output layer are one (tied), and llama.cpp can't adapt {' and '.join(export.embeddings)}"
