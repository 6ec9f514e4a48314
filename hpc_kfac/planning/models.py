"""Models to plan for by name, beside those of run files. Nothing is downloaded; only shapes matter."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.tasks.models_text import GPT
from hpc_kfac.tasks.models_vision import imagenet_resnet
from hpc_kfac.tasks.outlines import IMAGENET_CLASSES, Outline


class _Encoder(nn.Module):
    """A block of Devlin et al. 2019: attention and perceptron, each normalised after its sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.outputs = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = self.norm1(x + self.outputs(mixed.transpose(1, 2).flatten(2)))
        added: Tensor = self.norm2(x + self.contract(functional.gelu(self.expand(x))))
        return added


class Bert(nn.Module):
    """BERT for masked tokens (Devlin et al. 2019): the output layer's weight is tied to the embedding's.

    Args:
        width: features of a position.
        blocks: encoder blocks.
        heads: attention heads.
        sequence_length: positions.
        vocabulary: number of tokens.
    """

    def __init__(
        self, width: int = 1024, blocks: int = 24, heads: int = 16, sequence_length: int = 512, vocabulary: int = 30522
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(sequence_length, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(_Encoder(width, heads) for _ in range(blocks)))
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.blocks(self.norm(self.tokens(tokens) + self.positions(positions)))
        scores: Tensor = self.head(self.transform_norm(functional.gelu(self.transform(x))))
        return scores


def named(name: str) -> Outline:
    """A model by name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in MODELS:
        raise InputError(f"--model is {name!r}; choose one of {', '.join(MODELS)}, or name a task in a run file")
    return MODELS[name]


MODELS = {
    entry.name: entry
    for entry in (
        Outline("resnet50", partial(imagenet_resnet, 50, IMAGENET_CLASSES), (3, 224, 224)),
        Outline("bert_large", Bert, (512,), 30522),
        # 48 blocks of 12 x 4096^2, and 50 257 tokens twice: 10.1e9 parameters.
        Outline("gpt_10b", partial(GPT, 50257, 2048, 4096, 48, 32), (2048,), 50257),
    )
}
