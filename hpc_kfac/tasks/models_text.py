"""A small GPT made of linear layers, so that every weight matrix can be preconditioned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc_kfac.tasks.dropout import KeyedDropout


class Attention(nn.Module):
    """Causal self-attention; one linear layer makes queries, keys and values.

    Args:
        width: features of a position.
        heads: divides the width.
        dropout: rate after the output layer.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width)
        self.outputs = nn.Linear(width, width)
        self.dropout = KeyedDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inputs(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        dropped: Tensor = self.dropout(self.outputs(mixed.transpose(1, 2).flatten(2)))
        return dropped


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = KeyedDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        added: Tensor = x + self.dropout(self.contract(functional.gelu(self.expand(self.norm2(x)))))
        return added


class GPT(nn.Module):
    """A decoder-only transformer after Radford et al. 2019: tokens int64 ``[n, s]`` to scores ``[n, s, vocabulary]``.

    The output layer has weights of its own (not tied to the embedding), so both can be captured.

    Args:
        vocabulary: number of tokens.
        sequence_length: most positions of a sequence.
        width: features of a position.
        blocks: transformer blocks.
        heads: attention heads; must divide the width.
        dropout: rate, 0 for none.

    Raises:
        ValueError: a size that is not positive, or heads that do not divide the width.
    """

    def __init__(
        self,
        vocabulary: int,
        sequence_length: int,
        width: int = 128,
        blocks: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = dict(vocabulary=vocabulary, sequence_length=sequence_length, width=width, blocks=blocks, heads=heads)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} = {size} must be at least 1")
        if width % heads:
            raise ValueError(f"heads = {heads} does not divide width = {width}")
        self.sequence_length = sequence_length
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(sequence_length, width)
        self.dropout = KeyedDropout(dropout)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, dropout) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Layers that write into the residual stream start smaller: their sum keeps its size with depth.
                into_stream = name.endswith(("attention.outputs.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * blocks) ** 0.5 if into_stream else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.sequence_length:
            raise ValueError(f"sequence of {length} tokens; the model takes at most {self.sequence_length}")
        # Positions run over the batch as well, so that each layer sees leading axes [n, s].
        positions = torch.arange(length, device=tokens.device).expand(len(tokens), length)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


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
