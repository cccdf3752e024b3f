"""The order of a rank's blocks in a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tpirt.sharding.blocks import Block


@dataclass(frozen=True)
class Layer:
    """Block indices of one decoder layer. The outputs of MLP pieces are summed."""

    attention: int
    mlp: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """Block indices of a step: layers, then on rank 0 the pieces of the LM head."""

    layers: tuple[Layer, ...]
    head: tuple[int, ...]

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Program:
        """Derive the program from the names of a rank's blocks in order of use."""
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
