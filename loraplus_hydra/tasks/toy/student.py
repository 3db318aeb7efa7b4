"""A linear student that learns a low-rank change with LoRA.

LoRA on a layer of zeros, f = x A^T B^T, learns y = x dW^T. Each step uses all inputs, which are the unit vectors times
sqrt(width). The inputs have the second moment of x ~ N(0, I), so the gradient is exact, without sampling noise. dW = U
V has rank `rank`. The entries of U and V are drawn from N(0, 1 / width). So the singular values of dW are about 1 at
every width, and the outputs change as little as in fine-tuning.
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
    """The student's size.

    The student has `width` inputs and outputs, and learns a change with `rank`, drawn with `seed`. `vocab_size` is the
    largest possible width.
    """

    model_type = "loraplus_toy_student"

    def __init__(self, width: int = 256, rank: int = 4, seed: int = 0, vocab_size: int = 2048, **kwargs: Any) -> None:
        self.width, self.rank, self.seed, self.vocab_size = width, rank, seed, vocab_size
        super().__init__(**kwargs)


class ZeroLinear(nn.Linear):
    """A frozen layer of zeros that skips the multiplication."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.new_zeros((*input.shape[:-1], self.out_features))


class Student(PreTrainedModel):
    """The student, and the outputs that it learns. Token i is input i."""

    config_class = StudentConfig
    base_model_prefix = "student"

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        self.inputs = nn.Embedding(config.vocab_size, config.width)
        self.outputs = nn.Embedding(config.vocab_size, config.width)
        self.layer = ZeroLinear(config.width, config.width, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, because `fill` sets all layers."""

    @torch.no_grad()
    def fill(self) -> Student:
        """Fill the tables of inputs and outputs, and return the model."""
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
        """Return the squared error relative to the squared outputs; 1 if the student returns zeros."""
        wanted = self.outputs(input_ids)
        error = self.layer(self.inputs(input_ids)) - wanted
        return ModelOutput(loss=error.square().sum() / wanted.square().sum())

    def generate(self, **_: Any) -> torch.Tensor:
        raise UserError("the toy's student can't answer prompts")


class AutoStudent(_BaseAutoModelClass):
    """The toy's `task.auto_class`, which makes a Student from a config."""

    _model_mapping: ClassVar[Any] = OrderedDict({StudentConfig: Student})

    @classmethod
    def from_pretrained(cls, *_: Any, config: StudentConfig, **__: Any) -> Student:
        return Student(config).fill()


AutoConfig.register(StudentConfig.model_type, StudentConfig)
