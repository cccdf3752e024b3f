"""A checkpoint of random weights that tpirt and the converters of other programs can read.

    python -m bench.lib.random_checkpoint --shape bench-1.1b --out DIR

``tpirt synth`` makes slices, which only tpirt reads. This writes a Hugging Face directory in
bfloat16: weights of transformers' initialization, norms of 1, and a tokenizer in the form of
Llama 2's, of which converters know what to do with it: three control tokens, 256 bytes, fillers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from bench.lib.command import end_like_a_command, new_parser
from tpirt.config import ModelConfig
from tpirt.weights.names import expected_tensors
from tpirt.weights.shapes import Shape, find_shape

_STD = 0.02
_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def write_checkpoint(out: Path, shape: Shape) -> None:
    """Write the directory, created if missing."""
    out.mkdir(parents=True, exist_ok=True)
    content = {**shape, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    (out / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    config = ModelConfig.from_hf(content)
    _tokenizer(config.vocab_size).save(str(out / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("unk_token", "bos_token", "eos_token"), _SPECIAL_TOKENS, strict=True)),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: _tensor(name, sizes, generator) for name, sizes in expected_tensors(config).items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _tensor(name: str, sizes: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    values = torch.ones(*sizes, dtype=torch.bfloat16)
    if name.endswith("norm.weight"):
        return values
    return values.normal_(0, _STD, generator=generator)


def _tokenizer(vocab_size: int) -> Tokenizer:
    tokens = [*_SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [f"[{number}]" for number in range(len(tokens), vocab_size)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges=[], unk_token=_SPECIAL_TOKENS[0], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS]
    )
    return tokenizer


def main(argv: Sequence[str]) -> int:
    """Parse arguments, write."""
    parser = new_parser("bench.lib.random_checkpoint", __doc__)
    parser.add_argument("--shape", default="bench-1.1b", help="or a config.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    write_checkpoint(arguments.out, find_shape(arguments.shape))
    return 0


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
