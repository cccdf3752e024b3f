"""The order in which a step uses a rank's blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tpirt.sharding.blocks import Block


@dataclass(frozen=True)
class Layer:
    """One decoder layer: indices of its blocks. The pieces of an MLP add up."""

    attention: int
    mlp: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """What a step runs: layers, then on rank 0 the pieces of the LM head, as block indices."""

    layers: tuple[Layer, ...]
    head: tuple[int, ...]

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Program:
        """Read the program off the names of one rank's blocks, which are in the order of use."""
        layers: list[Layer] = []
        head: list[int] = []
        for index, block in enumerate(blocks):
            match block.name.split("."):
                case ["layers", _, "attention"]:
                    layers.append(Layer(index, ()))
                case ["layers", _, "mlp", *_]:
                    layers[-1] = Layer(layers[-1].attention, (*layers[-1].mlp, index))
                case ["head", _]:
                    head.append(index)
                case _:
                    raise ValueError(f"block {block.name}: not part of a decoder")
        return cls(tuple(layers), tuple(head))
