"""The configuration of a decoder-only transformer, read from ``config.json``.

Only :meth:`ModelConfig.from_hf` knows the quirks of ``config.json``; everything else reads the
frozen dataclass. Names and defaults are those of Hugging Face transformers' configuration classes
(5.23) and, where class and model code differ, of the model code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tpirt.errors import CheckpointError, ConfigError
from tpirt.files import read_regular

ROPE_KINDS = ("default", "linear", "dynamic", "llama3")
DTYPES = ("float32", "float16", "bfloat16")

# Spelling in config.json -> name in ``ModelConfig.hidden_act``. The tanh spellings are the same
# formula, equal up to float rounding.
ACTIVATION_NAMES: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
}

_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 65_536


@dataclass(frozen=True)
class _Family:
    """Differences between model families. A bias of ``None`` depends on the config key."""

    architecture: str  # prefix of the class names in ``architectures``
    max_position_embeddings: int
    num_key_value_heads: int | None = None  # if the key is missing; None: num_attention_heads
    head_dim: int | None = None  # if the key is missing; None: hidden_size / num_attention_heads
    rope_theta: float = 10_000.0
    qkv_bias: bool | None = False
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False
    windows: Literal["none", "all_layers", "per_layer"] = "none"


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("Llama", 2048, qkv_bias=None, o_bias=None, mlp_bias=None),
    "mistral": _Family("Mistral", 131_072, num_key_value_heads=8, windows="all_layers"),
    "qwen2": _Family("Qwen2", 32_768, num_key_value_heads=32, qkv_bias=True, windows="per_layer"),
    "qwen3": _Family(
        "Qwen3",
        32_768,
        num_key_value_heads=32,
        head_dim=128,
        qkv_bias=None,
        o_bias=None,
        qk_norm=True,
        windows="per_layer",
    ),
}

QUANTIZED = (
    "the weights are quantized already (GPTQ, AWQ, FP8 or the like), which is not supported; take "
    "the model's original repository in float32, float16 or bfloat16, and --quantize int4"
)

# Keys that change the computation and are not implemented.
_REFUSED_KEYS: Mapping[str, str] = {
    "quantization_config": QUANTIZED,
    "per_layer_config": "layers of different shapes are not supported",
}

_SLIDING_LAYER: Mapping[str, bool] = {
    "full_attention": False,
    "attention": False,  # older spelling
    "sliding_attention": True,
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and scaling.

    ``kind`` is one of ``default``, ``linear``, ``dynamic``, ``llama3``.
    ``original_max_position_embeddings`` is the length at which scaling starts for ``llama3`` and
    ``dynamic``. For ``linear`` it is the trained length if the file has it, else 0.

    Raises:
        ConfigError: a value of the wrong type, not finite or out of range.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ConfigError(
                f"rope type {_show(self.kind)} is not supported; supported: {', '.join(ROPE_KINDS)}"
            )
        for name in ("theta", "low_freq_factor", "high_freq_factor"):
            _positive_number(f"rope {name}", getattr(self, name))
        if _positive_number("rope factor", self.factor) < 1:
            raise ConfigError(f"rope factor: expected a number >= 1, got {self.factor}")
        original = "rope original_max_position_embeddings"
        smallest = 1 if self.kind in ("llama3", "dynamic") else 0
        _size(original, self.original_max_position_embeddings, smallest=smallest)
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope high_freq_factor: expected more than low_freq_factor "
                f"({self.low_freq_factor}), got {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Global (unsharded) shape and options of one model of any family.

    ``hidden_act`` is one of ``silu``, ``relu``, ``gelu``, ``gelu_pytorch_tanh`` (other spellings
    are mapped to these by :meth:`from_hf`). Validated on construction.

    Raises:
        ConfigError: a field of the wrong type or out of range, or fields that contradict each
            other.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # per layer; None = full attention
    dtype: str  # of the checkpoint: float32, float16 or bfloat16

    def __post_init__(self) -> None:
        for name in _SIZES:
            _size(name, getattr(self, name))
        for name in _FLAGS:
            _flag(name, getattr(self, name))
        _positive_number("rms_norm_eps", self.rms_norm_eps)
        _one_of("model_type", self.model_type, _FAMILIES)
        _one_of("hidden_act", self.hidden_act, set(ACTIVATION_NAMES.values()))
        _one_of("dtype", self.dtype, DTYPES)
        _check_heads(self)
        _check_windows(self)

    @property
    def q_heads_per_kv(self) -> int:
        """Query heads that share one key/value head (1 without grouped-query attention)."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def context_length(self) -> int:
        """Maximum tokens of one sequence, prompt and answer.

        ``max_position_embeddings``, times the rope factor for ``linear`` and ``dynamic`` scaling.
        If the file has an ``original_max_position_embeddings``, ``max_position_embeddings`` is
        the scaled length already.
        """
        unstretched = (0, self.max_position_embeddings)
        if self.rope.kind not in ("linear", "dynamic"):
            return self.max_position_embeddings
        if self.rope.original_max_position_embeddings not in unstretched:
            return self.max_position_embeddings
        return int(self.max_position_embeddings * self.rope.factor)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], default_dtype: str = "float32") -> ModelConfig:
        """Translate the content of a ``config.json``.

        Families: llama, mistral, qwen2, qwen3. Missing keys get transformers' defaults of the
        family; five sizes are required.

        Args:
            config: the JSON object, with the old (``rope_theta``, ``rope_scaling``) or the new
                rope keys (``rope_parameters``), and ``dtype`` or ``torch_dtype``.
            default_dtype: the checkpoint's, if the file has none, or ``auto``.

        Raises:
            ConfigError: an unsupported family, architecture, rope type, activation, dtype or
                quantization, a missing key, or a value of the wrong type or range; the message
                has the key, the value and the supported values.
        """
        with _named("config.json"):
            return _translate(config, default_dtype)

    @classmethod
    def from_dir(cls, path: Path, default_dtype: str = "float32") -> ModelConfig:
        """Read and translate ``path/config.json``.

        Raises:
            CheckpointError: no such directory or file, unreadable, or not a JSON object.
            ConfigError: as :meth:`from_hf`, or a file next to it says that the weights are
                quantized; the message names the file.
        """
        file = Path(path) / "config.json"
        content = _read_json_object(file)
        with _named(str(file)):
            config = _translate(content, default_dtype)
        for name in ("quantize_config.json", "quant_config.json"):  # older GPTQ and AWQ
            if (file.parent / name).is_file():
                raise ConfigError(f"{file.parent / name}: {QUANTIZED}")
        return config

    def to_json(self) -> str:
        """Serialize to one line of JSON with sorted keys; :meth:`from_json` restores it exactly."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Parse the output of :meth:`to_json`; safe for text from a peer.

        A missing field has its default: text that was stored before there was the field is read.

        Raises:
            ConfigError: not JSON, missing or unknown fields, or an invalid configuration.
        """
        with _named("model configuration"):
            try:
                content = json.loads(text)
            except (ValueError, TypeError, RecursionError) as exc:
                raise ConfigError(f"not valid JSON: {exc}") from exc
            values = _known_fields(content, cls)
            rope = _known_fields(values["rope"], RopeConfig, "rope")
            windows = values["sliding_windows"]
            if not isinstance(windows, list):
                raise ConfigError(f"sliding_windows: expected a list, got {_show(windows)}")
            values["rope"] = RopeConfig(**rope)
            values["sliding_windows"] = tuple(windows)
            return cls(**values)


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_FLAGS = ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm")


# -- values ----------------------------------------------------------------------------------


def _show(value: object) -> str:
    """Format a value from a file for a message: JSON of at most 80 characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _size(name: str, value: object, *, smallest: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}: expected a whole number, got {_show(value)}")
    largest = _MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE
    if not smallest <= value <= largest:
        raise ConfigError(f"{name}: expected {smallest} to {largest}, got {_show(value)}")
    return value


def _positive_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}: expected a number, got {_show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{name}: expected a positive finite number, got {_show(value)}")
    return number


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, got {_show(value)}")
    return value


def _one_of(name: str, value: object, supported: Any) -> str:
    if not isinstance(value, str) or value not in supported:
        raise ConfigError(
            f"{name} {_show(value)} is not supported; supported: {', '.join(sorted(supported))}"
        )
    return value


def _check_heads(config: ModelConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads: expected a multiple of num_key_value_heads "
            f"({config.num_key_value_heads}), got {config.num_attention_heads}"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim: expected an even number (rope), got {config.head_dim}")
    if not isinstance(config.rope, RopeConfig):
        raise ConfigError(f"rope: expected a RopeConfig, got {_show(config.rope)}")
    if config.rope.kind == "dynamic" and config.head_dim == 2:
        raise ConfigError("head_dim: dynamic rope needs more than 2, got 2")


def _check_windows(config: ModelConfig) -> None:
    windows = config.sliding_windows
    if not isinstance(windows, tuple) or len(windows) != config.num_hidden_layers:
        raise ConfigError(
            f"sliding_windows: expected one entry for each of {config.num_hidden_layers} layers, "
            f"got {len(windows) if isinstance(windows, tuple) else _show(windows)}"
        )
    for window in windows:
        if window is not None:
            _size("sliding_window", window)


# -- reading ---------------------------------------------------------------------------------


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Prefix error messages with the name of the source."""
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(f"{source}: {exc}") from exc


def _read_json_object(file: Path) -> Mapping[str, Any]:
    if not file.parent.is_dir():
        raise CheckpointError(
            f"{file.parent}: expected a model directory, found no directory; get a model with "
            "`hf download ORG/NAME --local-dir DIR`"
        )
    try:
        content = json.loads(read_regular(file))
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"{file}: no such file; a model directory has config.json, tokenizer and "
            f"*.safetensors files"
        ) from exc
    except OSError as exc:
        raise CheckpointError(f"{file}: cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{file}: not valid JSON ({exc}); copy the file again") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {_show(content)}")
    return content


def _known_fields(content: object, cls: type, name: str = "") -> dict[str, Any]:
    """Check that a JSON object has the fields of a dataclass; those with a default may lack."""
    subject = f"{name}: " if name else ""
    if not isinstance(content, dict):
        raise ConfigError(f"{subject}expected a JSON object, got {_show(content)}")
    known = {field.name for field in fields(cls)}
    required = {field.name for field in fields(cls) if field.default is MISSING}
    for key in sorted(required - set(content)):
        raise ConfigError(f"{subject}missing key {key}")
    for key in sorted(set(content) - known):
        raise ConfigError(f"{subject}unknown key {_show(key)}")
    return dict(content)


def _translate(config: Mapping[str, Any], default_dtype: str) -> ModelConfig:
    if not isinstance(config, Mapping):
        raise ConfigError(f"expected a JSON object, got {_show(config)}")
    family = _family(config)
    _refuse_unsupported(config)
    heads = _required_size(config, "num_attention_heads")
    hidden = _required_size(config, "hidden_size")
    layers = _required_size(config, "num_hidden_layers")
    positions = _size(
        "max_position_embeddings",
        config.get("max_position_embeddings", family.max_position_embeddings),
    )
    act = _one_of("hidden_act", config.get("hidden_act", "silu"), ACTIVATION_NAMES)
    return ModelConfig(
        model_type=config["model_type"],
        hidden_size=hidden,
        intermediate_size=_required_size(config, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(config, family, heads),
        head_dim=_head_dim(config, family, hidden, heads),
        vocab_size=_required_size(config, "vocab_size"),
        max_position_embeddings=positions,
        rms_norm_eps=_positive_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        hidden_act=ACTIVATION_NAMES[act],
        rope=_rope(config, family, positions),
        tie_word_embeddings=_flag("tie_word_embeddings", config.get("tie_word_embeddings", False)),
        qkv_bias=_bias(config, "attention_bias", family.qkv_bias),
        o_bias=_bias(config, "attention_bias", family.o_bias),
        mlp_bias=_bias(config, "mlp_bias", family.mlp_bias),
        qk_norm=family.qk_norm,
        sliding_windows=_windows(config, family, layers),
        dtype=_dtype(config, default_dtype),
    )


def _family(config: Mapping[str, Any]) -> _Family:
    if "model_type" not in config:
        raise ConfigError("missing key model_type")
    family = _FAMILIES[_one_of("model_type", config["model_type"], _FAMILIES)]
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"architectures: expected a list, got {_show(architectures)}")
    supported = {f"{family.architecture}ForCausalLM", f"{family.architecture}Model"}
    for architecture in architectures:
        _one_of("architecture", architecture, supported)
    return family


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, reason in _REFUSED_KEYS.items():
        if config.get(key) is not None:
            raise ConfigError(f"{key}: {reason}")
    if config.get("is_causal") is False:
        raise ConfigError("is_causal: expected true (a text generator), got false")


def _required_size(config: Mapping[str, Any], key: str) -> int:
    if key not in config:
        raise ConfigError(f"missing key {key}")
    return _size(key, config[key])


def _kv_heads(config: Mapping[str, Any], family: _Family, heads: int) -> int:
    value = config.get("num_key_value_heads", family.num_key_value_heads)
    return heads if value is None else _size("num_key_value_heads", value)


def _head_dim(config: Mapping[str, Any], family: _Family, hidden: int, heads: int) -> int:
    value = config.get("head_dim", family.head_dim)
    if value is not None or family.head_dim is not None:
        return _size("head_dim", value)
    if hidden % heads:
        raise ConfigError(
            f"hidden_size: expected a multiple of num_attention_heads ({heads}) without head_dim, "
            f"got {hidden}"
        )
    return hidden // heads


def _bias(config: Mapping[str, Any], key: str, of_family: bool | None) -> bool:
    return _flag(key, config.get(key, False)) if of_family is None else of_family


def _dtype(config: Mapping[str, Any], default: str) -> str:
    for key in ("dtype", "torch_dtype"):  # the new name and the old one
        if config.get(key) not in (None, "auto"):
            return _one_of(key, config[key], DTYPES)
    return default


def _windows(config: Mapping[str, Any], family: _Family, layers: int) -> tuple[int | None, ...]:
    window = _window(config, family)
    first = 0
    if family.windows == "per_layer":
        first = _size("max_window_layers", config.get("max_window_layers", 28), smallest=0)
    derived = tuple(window if layer >= first else None for layer in range(layers))
    kinds = config.get("layer_types")
    if kinds is None:
        return derived
    stated = _stated_windows(kinds, window, layers)
    if family.windows != "per_layer" and stated != derived:
        raise ConfigError(
            f"layer_types: attention kinds that alternate by layer are not supported for "
            f"model_type {_show(config['model_type'])}"
        )
    return stated


def _window(config: Mapping[str, Any], family: _Family) -> int | None:
    if family.windows == "none":
        return None
    switch = config.get("use_sliding_window", False)
    if family.windows == "per_layer" and not _flag("use_sliding_window", switch):
        return None
    window = config.get("sliding_window", 4096)
    return None if window is None else _size("sliding_window", window)


def _stated_windows(kinds: object, window: int | None, layers: int) -> tuple[int | None, ...]:
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(
            f"layer_types: expected a list of {layers} (num_hidden_layers), got {_show(kinds)}"
        )
    sliding = [_SLIDING_LAYER[_one_of("layer type", kind, _SLIDING_LAYER)] for kind in kinds]
    if window is None and any(sliding):
        raise ConfigError(
            "layer_types: sliding_attention needs a sliding_window (and use_sliding_window true)"
        )
    return tuple(window if slides else None for slides in sliding)


def _rope(config: Mapping[str, Any], family: _Family, positions: int) -> RopeConfig:
    """Merge both spellings as transformers does: ``rope_scaling`` first, inner ``rope_theta``."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(key) or {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}: expected a JSON object, got {_show(values)}")
    for name, value in values.items():
        if isinstance(value, Mapping):
            raise ConfigError(f"{key}: rope that differs by layer ({name}) is not supported")
    for source in (config, values):
        if source.get("partial_rotary_factor") not in (None, 1):
            raise ConfigError(
                f"partial_rotary_factor: expected 1, got {_show(source['partial_rotary_factor'])}"
            )
    kind = _one_of("rope type", values.get("rope_type", values.get("type", "default")), ROPE_KINDS)
    theta = values.get("rope_theta", config.get("rope_theta", family.rope_theta))
    return _scaled_rope(key, kind, _positive_number("rope_theta", theta), values, config, positions)


def _scaled_rope(
    key: str,
    kind: str,
    theta: float,
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    positions: int,
) -> RopeConfig:
    if kind == "default":
        return RopeConfig(theta)
    name = "original_max_position_embeddings"
    # Some files have it at the top level; transformers prefers that one.
    stated = [s[name] for s in (config, values) if s.get(name) is not None]
    original = _size(name, stated[0]) if stated else 0 if kind == "linear" else positions
    if kind == "dynamic" and original != positions:
        # Scaling starts past max_position_embeddings, which is the context limit here. Within
        # the limit, this is rope without scaling.
        return RopeConfig(theta)
    keys = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    for required in keys:
        if required not in values:
            raise ConfigError(f"{key}: rope type {kind} needs the key {required}")
    factors = {each: _positive_number(f"{key} {each}", values[each]) for each in keys}
    return RopeConfig(theta, kind, original_max_position_embeddings=original, **factors)
