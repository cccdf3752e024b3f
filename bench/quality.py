"""What 8 and 4 bits cost in predictions, on a model large enough to judge them by.

    python -m bench.quality --dir DIR --minutes 30

The bundled model is too small for groups of 4-bit codes. This trains one of four times its size
from scratch on the source files of Python's own library, once (``DIR`` keeps it), and measures the
files that it has not seen, through ``tpirt eval --kl`` over two ranks, for every way of keeping
weights. With ``--dtype float32`` only the weights are rounded; else the inputs of products too.
The budget is processor time per thread: what else the machine does costs no quality.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from bench.lib.command import end_like_a_command, new_parser, run_tpirt, tell
from bench.lib.record import Record, add_json_option
from scripts.demo_model.model import DemoConfig, DemoModel
from scripts.demo_model.tokens import token_id
from tpirt.cli.options import count
from tpirt.config import ModelConfig
from tpirt.dtypes import RUN_DTYPES
from tpirt.sharding.blocks import weight_bits
from tpirt.sharding.format import WeightFormat

# Inputs of every product are whole groups of 128 on two ranks as well: 384, 256, 512 of them.
CONFIG = DemoConfig(
    vocab_size=4096,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
)
RANKS = 2
REFERENCE = ("none", "float32")
SETTINGS = (
    REFERENCE,
    ("none", "bfloat16"),
    ("int8", "float32"),
    ("int8", "auto"),
    ("int4", "float32"),
    ("int4", "auto"),
    ("nl4", "float32"),
    ("nl4", "auto"),
)

_END = "<|endoftext|>"
# Tests would be most of the text, and tables of characters teach nothing.
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings"}
_HELD_BACK_EVERY = 20
_PASSAGE_CHARS = 5000  # of each file held back: all kinds of files count, not the longest

_ROWS = 8  # of one step; few, since the text is short and every step counts
_RATE = 2e-3
_WARM_UP = 0.03
_TELL_EVERY_S = 15.0


def library_files(root: Path) -> list[Path]:
    """The library's source files, in an order that depends on their names only."""
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in paths if not _LEFT_OUT.intersection(path.parts)]
    return sorted(kept, key=Path.as_posix)


def split(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files to train on, and every 20th to measure with."""
    kept = [path for number, path in enumerate(files) if number % _HELD_BACK_EVERY]
    return kept, list(files[::_HELD_BACK_EVERY])


def read(root: Path, files: Iterable[Path]) -> list[str]:
    """The texts of files; a few of the library's are not UTF-8."""
    return [(root / path).read_text(encoding="utf-8", errors="replace") for path in files]


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE: it can encode whatever is held back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """All texts as one row of ids, each with an end behind it."""
    encoded = tokenizer.encode_batch_fast([text + _END for text in texts])
    return torch.tensor([token for one in encoded for token in one.ids])


def rate_factor(progress: float) -> float:
    """Of the learning rate: a short rise, then half a cosine down to nothing."""
    if progress < _WARM_UP:
        return (progress + 1e-3) / (_WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))))


class Meter:
    """How much of the budget is used, and what came of it."""

    def __init__(self, minutes: float) -> None:
        self._budget_s = minutes * 60
        self._cpu_started = time.process_time()
        self._told = self._started = time.monotonic()
        self._tokens = 0
        self._losses: list[float] = []

    def progress(self) -> float:
        """The share of the budget used; 1 and more at its end."""
        return self._used_s() / self._budget_s

    def add(self, tokens: int, loss: float) -> None:
        """Count a step; tell now and then."""
        self._tokens += tokens
        self._losses.append(loss)
        if time.monotonic() - self._told >= _TELL_EVERY_S:
            self.tell()

    def tell(self) -> None:
        """Report on what was done since last time."""
        self._told = time.monotonic()
        used_s = self._used_s()
        left_min = max(0.0, self._budget_s - used_s) / 60
        tell(
            f"loss {sum(self._losses) / len(self._losses):.3f}, {self._tokens:,} tokens, "
            f"{self._tokens / used_s:.0f} tokens/s and {left_min:.1f} min left of processor time"
        )
        self._losses.clear()

    def summary(self) -> dict[str, float]:
        """The totals."""
        return {
            "tokens": self._tokens,
            "cpu_s": round(time.process_time() - self._cpu_started, 1),
            "wall_s": round(time.monotonic() - self._started, 1),
        }

    def _used_s(self) -> float:
        return (time.process_time() - self._cpu_started) / torch.get_num_threads()


def train(ids: Tensor, minutes: float) -> tuple[DemoModel, dict[str, float]]:
    """Train a new model on random pieces of the text until the budget is used up."""
    torch.manual_seed(1)
    model = DemoModel(CONFIG)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    norms = [weight for weight in model.parameters() if weight.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    meter = Meter(minutes)
    while (progress := meter.progress()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * rate_factor(progress)
        inputs, targets = draw(ids)
        loss = F.cross_entropy(predict(model, inputs), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.add(inputs.numel(), loss.item())
    return model, meter.summary()


def draw(ids: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of random pieces (B, T), and the token after each of their tokens."""
    length = CONFIG.max_position_embeddings
    starts = torch.randint(len(ids) - length, (_ROWS, 1))
    places = starts + torch.arange(length)
    return ids[places], ids[places + 1]


def predict(model: DemoModel, inputs: Tensor) -> Tensor:
    """Logits (B T, V), their products in bfloat16."""
    everywhere = torch.ones_like(inputs, dtype=torch.bool)
    logits: Tensor = model(inputs, everywhere, torch.bfloat16)
    return logits


def hugging_face_config(end_id: int) -> dict[str, Any]:
    """The content of ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(CONFIG),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end_id,
        "torch_dtype": "float32",
    }


def save(directory: Path, model: DemoModel, tokenizer: Tokenizer) -> None:
    """Write the model as a Hugging Face directory; the weights last, whole or not at all."""
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "config.json", hugging_face_config(token_id(tokenizer, _END)))
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END},
    )
    partial = directory / "model.safetensors.partial"
    save_file(dict(model.state_dict()), partial, metadata={"format": "pt"})
    os.replace(partial, directory / "model.safetensors")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_model(directory: Path, minutes: float) -> None:
    """Train a model, and leave it in ``directory`` with the text that it has not seen."""
    root = Path(sysconfig.get_path("stdlib"))
    seen, held_back = split(library_files(root))
    texts = read(root, seen)
    tokenizer = train_tokenizer(texts)
    ids = encode(tokenizer, texts)
    tell(f"{len(seen)} files, {len(ids):,} tokens to train on; {len(held_back)} held back")
    model, took = train(ids, minutes)
    weights = sum(weight.numel() for weight in model.parameters())
    directory.mkdir(parents=True, exist_ok=True)
    passages = [text[:_PASSAGE_CHARS] for text in read(root, held_back)]
    (directory / "held_back.txt").write_text("\n".join(passages), encoding="utf-8")
    write_json(
        directory / "training.json", {"weights": weights, "text_tokens": len(ids), "trained": took}
    )
    save(directory, model, tokenizer)


@dataclass(frozen=True)
class Row:
    """One way of keeping weights: bits of one inside the layers, and what it costs.

    ``change`` is the perplexity's, in percent; ``kl`` and ``kl_worst`` are in nats a token;
    ``same_top`` is in percent.
    """

    quantize: str
    dtype: str
    bits: float
    perplexity: float
    change: float
    kl: float
    kl_worst: float
    same_top: float


def evaluate(
    arguments: argparse.Namespace, quantize: str, dtype: str, store: str
) -> dict[str, Any]:
    """What ``tpirt eval`` prints for the text held back."""
    options = ["--model", str(arguments.dir), "--local", str(RANKS), "--quiet"]
    options += ["--text", str(arguments.dir / "held_back.txt"), "--json", "--store", store, "--kl"]
    options += ["--context", str(CONFIG.max_position_embeddings)]
    options += ["--threads", str(max(1, arguments.threads // RANKS))]
    options += ["--quantize", quantize, "--dtype", dtype]
    figures: dict[str, Any] = json.loads(run_tpirt("eval", *options))
    return figures


def bits(quantize: str, dtype: str) -> float:
    """Bits of a weight inside the layers, scales and zero points included."""
    stored = dtype if dtype in RUN_DTYPES else "bfloat16"  # quantized: it makes no difference
    config = ModelConfig.from_hf(hugging_face_config(0))
    return weight_bits(config, WeightFormat.named(stored, quantize))


def rows(measured: Mapping[tuple[str, str], Mapping[str, float]]) -> list[Row]:
    """Set the figures of each setting against the reference's."""
    reference = measured[REFERENCE]["perplexity"]
    return [
        Row(
            *setting,
            bits=bits(*setting),
            perplexity=found["perplexity"],
            change=100 * (found["perplexity"] / reference - 1),
            kl=found["kl_mean"],
            kl_worst=found["kl_worst"],
            same_top=100 * found["same_top_token"],
        )
        for setting, found in measured.items()
    ]


def table(measured: Sequence[Row]) -> str:
    """The rows for people."""
    lines = ["weights  dtype      bits  perplexity    change        KL  same top"]
    for row in measured:
        lines.append(
            f"{row.quantize:8} {row.dtype:8} {row.bits:6.2f} {row.perplexity:11.4f} "
            f"{row.change:+8.3f}% {row.kl:9.6f} {row.same_top:8.2f}%"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Parse arguments, train unless that was done, measure, print."""
    parser = new_parser("bench.quality", __doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where the model is, or will be")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="of training, per thread (default 30)"
    )
    parser.add_argument(
        "--threads", type=count, default=os.cpu_count(), help="to compute with (default: cores)"
    )
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    record = Record("quality", argv, arguments)
    torch.set_num_threads(arguments.threads)
    if not (arguments.dir / "model.safetensors").exists():
        make_model(arguments.dir, arguments.minutes)
    measured, tokens = {}, 0
    with tempfile.TemporaryDirectory(prefix="tpirt-quality-") as store:
        for setting in SETTINGS:
            measured[setting] = found = evaluate(arguments, *setting, store)
            tokens = found["tokens"]
            tell(f"{' '.join(setting)}: {found['perplexity']:.4f}, KL {found['kl_mean']:.6f}")
    done = rows(measured)
    print(table(done))
    training = json.loads((arguments.dir / "training.json").read_text(encoding="utf-8"))
    body = {"model": training, "eval_tokens": tokens, "rows": [asdict(row) for row in done]}
    record.finish(body)
    return 0


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
