"""Architectures that the targets of `export` load, by transformers' class names.

Only classes that transformers itself has are listed. vLLM's lists are of version 0.33.0, from its model registry and
the `supports_lora` and `embedding_modules` of each class. llama.cpp's list is of its commit 0c1e570 (October 2026),
from its converter's table of text models.
"""

from __future__ import annotations


def _classes(names: str, ending: str = "ForCausalLM") -> frozenset[str]:
    return frozenset(name + ending for name in names.split())


# vLLM's own models that take LoRA adapters, with LoRA on the embedding and the output layer
_VLLM_WITH_EMBEDDINGS = _classes(
    "Apertus Ernie4_5 Exaone4 ExaoneMoe FalconH1 Granite GraniteMoe GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared "
    "GraniteSWA HyperCLOVAX Jamba Lfm2 Lfm2Moe Llama4 Llama MiniCPM3 Mixtral Nemotron NemotronH Phi3 Qwen3 Qwen3Moe "
    "Qwen3_5 Qwen3_5Moe"
)
_VLLM_WITH_INPUT_EMBEDDING = _classes("Cohere Cohere2")
_VLLM_WITHOUT_EMBEDDINGS = _classes(
    "AXK1 Afmoe DeepseekV2 DeepseekV3 Ernie4_5_Moe Gemma2 Gemma3 Gemma4 Gemma Glm4 Glm4Moe Glm4MoeLite GptOss HYV3 "
    "Laguna LongcatFlash MiniMaxM2 Ministral3 Mistral OPT OlmoHybrid Olmoe Qwen2 Qwen2Moe Qwen3Next"
)
VLLM_WITHOUT_LORA = _classes(
    "Beam Bloom Cohere2Moe Dbrx DeepseekV32 DeepseekV4 Falcon FalconMamba Flint GPTJ Gemma3n GlmMoeDsa HYV4 HrmText "
    "Inkling KimiLinear Mamba2 Mamba MiMoV2Flash Qwen4Exp StableLm Zamba2"
) | {"GPT2LMHeadModel"}
VLLM_WITH_LORA = _VLLM_WITH_EMBEDDINGS | _VLLM_WITH_INPUT_EMBEDDING | _VLLM_WITHOUT_EMBEDDINGS
VLLM_CLASSIFIERS = _classes("Bert GPT2 Jamba ModernBert Roberta XLMRoberta", "ForSequenceClassification")

LLAMA_CPP = _classes(
    "Afmoe Apertus Arcee Bamba BitNet Bloom Cohere2 Cohere2Moe Cohere Dbrx DeepseekV2 DeepseekV32 DeepseekV3 "
    "DeepseekV4 Dots1 Dots3Note Ernie4_5 Ernie4_5_Moe Exaone4 ExaoneMoe Falcon FalconH1 FalconMamba GPTBigCode "
    "GPTNeoX Gemma2 Gemma3 Gemma3n Gemma4 Gemma Glm4 Glm4Moe Glm4MoeLite Glm GlmMoeDsa GptOss Granite GraniteMoe "
    "GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared GraniteSWA HYV3 HYV4 HrmText HunYuanDenseV1 HunYuanMoEV1 Jais2 "
    "Jamba KimiLinear Laguna Lfm2 Lfm2Moe Llama4 Llama Mamba2 Mamba Mellum MiMoV2Flash MiniCPM3 MiniMaxM2 Ministral3 "
    "Mistral Mixtral Nemotron NemotronH Olmo2 Olmo3 Olmo Olmoe Phi3 Phi Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next "
    "Qwen3_5 Qwen3_5Moe Qwen4Exp SeedOss SmolLM3 SolarOpen StableLm Starcoder2 Youtu"
) | {"GPT2LMHeadModel", "Gemma3ForConditionalGeneration"}
# Tiny models of these were converted with an adapter on every linear layer, and llama.cpp computed what PEFT computes.
# Others may go wrong silently: in some models llama.cpp adds an adapter only to a part of the layers.
LLAMA_CPP_ADAPTERS = _classes(
    "Apertus Arcee Bloom Cohere Exaone4 Gemma Gemma2 Gemma3 Granite Llama Mistral Nemotron Olmo Olmo2 Olmo3 Phi3 Qwen2 "
    "Qwen3 SeedOss SmolLM3 StableLm Starcoder2"
)
# llama.cpp uses the embedding as the output layer of these, and its converter drops an output layer of their own.
LLAMA_CPP_ALWAYS_TIED = _classes("BitNet Cohere Cohere2 Gemma Gemma2")
# A key of config.json that llama.cpp's converter needs and transformers may leave out
LLAMA_CPP_KEYS = {"GPT2LMHeadModel": "n_ctx", "GPTNeoXForCausalLM": "rotary_pct"}
# llama.cpp's converter reads the tokenizer of these from tokenizer.model only.
LLAMA_CPP_SENTENCEPIECE = _classes("BitNet Ernie4_5 Ernie4_5_Moe Gemma Gemma2 MiniCPM3 Nemotron Phi3")


def vllm_embeddings(architecture: str) -> frozenset[str]:
    """Return the layers beside the linear ones on which vLLM takes LoRA: `embed_tokens`, `lm_head`."""
    if architecture in _VLLM_WITH_EMBEDDINGS:
        return frozenset({"embed_tokens", "lm_head"})
    # vLLM runs an architecture without a model of its own through transformers' code.
    if architecture in _VLLM_WITH_INPUT_EMBEDDING or architecture not in VLLM_WITH_LORA | VLLM_WITHOUT_LORA:
        return frozenset({"embed_tokens"})
    return frozenset()
