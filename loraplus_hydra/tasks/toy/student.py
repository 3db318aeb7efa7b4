"""A linear student: y = x dW^T is to be learnt by LoRA on a layer of zeros, f = x A^T B^T.

The inputs are sqrt(width) times the unit vectors, all of them in each step: their mean is that over x ~ N(0, I), so the
gradient is the exact one, without noise of a sample. dW = U V, its factors' entries drawn from N(0, 1 / width): of rank
`rank`, with singular values around 1 whatever the width, as small a change of the outputs as fine-tuning is.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import ModelOutput

from loraplus_hydra.errors import UserError


class StudentConfig(PreTrainedConfig):
    """`width` inputs and as many outputs; `rank` of the change; `seed` draws it. `vocab_size` bounds the width."""

    model_type = "loraplus_toy_student"

    def __init__(self, width: int = 256, rank: int = 4, seed: int = 0, vocab_size: int = 2048, **kwargs: Any) -> None:
        self.width, self.rank, self.seed, self.vocab_size = width, rank, seed, vocab_size
        super().__init__(**kwargs)


class ZeroLinear(nn.Linear):
    """A layer whose weight is zero and stays so: nothing is multiplied."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.new_zeros((*input.shape[:-1], self.out_features))


class Student(PreTrainedModel):
    """The student beside the outputs that it is to give. Token i is input i."""

    config_class = StudentConfig
    base_model_prefix = "student"

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        self.inputs = nn.Embedding(config.vocab_size, config.width)
        self.outputs = nn.Embedding(config.vocab_size, config.width)
        self.layer = ZeroLinear(config.width, config.width, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing here is drawn layer by layer: see `fill`."""

    @torch.no_grad()
    def fill(self) -> Student:
        """Set inputs and outputs."""
        width, rank = self.config.width, self.config.rank
        generator = torch.Generator().manual_seed(self.config.seed)
        U, V = (torch.randn(width, rank, generator=generator) / math.sqrt(width) for _ in range(2))
        for table, rows in ((self.inputs, torch.eye(width)), (self.outputs, V @ U.T)):
            table.weight.zero_()
            table.weight[:width] = math.sqrt(width) * rows
        self.layer.weight.zero_()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.inputs

    def forward(self, input_ids: torch.Tensor, return_loss: bool = True) -> ModelOutput:
        """The squared error relative to the outputs' square: 1 for a student that says nothing."""
        wanted = self.outputs(input_ids)
        error = self.layer(self.inputs(input_ids)) - wanted
        return ModelOutput(loss=error.square().sum() / wanted.square().sum())

    def generate(self, **_: Any) -> torch.Tensor:
        raise UserError("the toy's student answers no prompts")


class AutoStudent(_BaseAutoModelClass):
    """What `task.auto_class` names: makes a Student of its config. There are no weights to be loaded."""

    _model_mapping: ClassVar[Any] = OrderedDict({StudentConfig: Student})

    @classmethod
    def from_pretrained(cls, *_: Any, config: StudentConfig, **__: Any) -> Student:
        return Student(config).fill()


AutoConfig.register(StudentConfig.model_type, StudentConfig)
