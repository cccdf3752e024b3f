"""Bad input through the command line: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.interrupted import INTERRUPTED
from tests.support.nightly import nightly
from tpirt.cli.main import main
from tpirt.testing.models import make_model
from tpirt.testing.processes import (
    DEADLINE_S,
    PeerProcess,
    descendants,
    killed_at_exit,
    run_cli,
    run_python,
    start_cli,
    start_python,
    survivors,
    wait_for,
)


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The message: the last line, and but for argparse's usage the only one."""
        lines = self.err.splitlines()
        assert lines, "no message"
        assert len(lines) == 1 or lines[0].startswith("usage: "), self.err
        return lines[-1]


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Runs ``tpirt`` in this process. An exception that is none of ours comes through."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Result:
        try:
            code = main(arguments)
        except SystemExit as exc:
            code = int(exc.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("whole") / "tiny",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        max_position_embeddings=128,
    )


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


# -- model directories -----------------------------------------------------------------------


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "REMOVED"}))


def edit_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def beyond(header: dict[str, Any]) -> None:
    entry = header["model.norm.weight"]
    entry["data_offsets"] = [value + (1 << 40) for value in entry["data_offsets"]]


def overlapping(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"][
        "data_offsets"
    ]


def reshape(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, model / "model.safetensors")


def drop_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def quantize(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj."
    tensors[name + "qweight"] = tensors.pop(name + "weight").int()
    save_file(tensors, model / "model.safetensors")


def make_index(model: Path, tensor: str | None = None) -> None:
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    if tensor is None:
        weight_map[names[0]] = "model-00002-of-00002.safetensors"
    else:
        weight_map[tensor] = "model-00001-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "config.json", **changes)


def set_defaults(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "generation_config.json", **changes)


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda model: os.truncate(model / name, size)


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content if isinstance(content, bytes) else content.encode()

    def change(model: Path) -> None:
        (model / name).write_bytes(data)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def empty(model: Path) -> None:
    for file in model.iterdir():
        file.unlink()


def is_a_folder(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return change


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing directory": (shutil.rmtree, ("model", "no directory")),
    "empty directory": (empty, ("config.json", "no such file")),
    "no config": (remove("config.json"), ("config.json", "no such file")),
    "config empty": (truncate("config.json", 0), ("config.json", "not valid JSON")),
    "config not an object": (write("config.json", "[]"), ("config.json", "JSON object")),
    "config a folder": (is_a_folder("config.json"), ("config.json",)),
    "architecture": (set_config(model_type="mamba"), ("config.json", '"mamba"', "llama")),
    "architectures": (
        set_config(architectures=["LlamaForSequenceClassification"]),
        ("config.json", "LlamaForSequenceClassification"),
    ),
    "activation": (set_config(hidden_act="swiglu"), ("hidden_act", '"swiglu"', "silu")),
    "rope type": (
        set_config(rope_scaling={"rope_type": "yarn", "factor": 2}),
        ("rope type", '"yarn"', "llama3"),
    ),
    "rope factor": (set_config(rope_scaling={"rope_type": "linear"}), ("factor",)),
    "rope factor nan": (
        set_config(rope_scaling={"rope_type": "linear", "factor": float("nan")}),
        ("factor",),
    ),
    "quantized": (
        set_config(quantization_config={"bits": 4}),
        ("config.json", "quantization_config", "quantized already", "--quantize int4"),
    ),
    "quantized, said elsewhere": (
        write("quantize_config.json", "{}"),
        ("quantize_config.json", "quantized already", "--quantize int4"),
    ),
    "quantized, not said": (
        quantize,
        ("down_proj.qweight", "quantized already", "--quantize int4"),
    ),
    "only GGUF": (
        lambda m: [empty(m), write("model.gguf", "GGUF")(m)],
        ("model.gguf", "GGUF is not supported", "config.json", "--quantize int4"),
    ),
    "only GGUF weights": (
        lambda m: (m / "model.safetensors").rename(m / "model.gguf"),
        ("model.gguf", "--quantize int4"),
    ),
    "heads": (set_config(num_key_value_heads=3), ("num_key_value_heads",)),
    "hidden size": (set_config(hidden_size=64), ("expected (64,)", "got (32,)")),
    "negative size": (set_config(intermediate_size=-1), ("intermediate_size", "-1")),
    "size a text": (set_config(hidden_size="32"), ("hidden_size", '"32"')),
    "layers": (set_config(num_hidden_layers=2), ("layers.1", "missing")),
    "no weights": (remove("model.safetensors"), ("model", "safetensors")),
    "weights empty": (truncate("model.safetensors", 0), ("model.safetensors", "too short")),
    "weights cut in the header": (truncate("model.safetensors", 99), ("truncated", "header")),
    "weights cut": (truncate("model.safetensors", 50_000), ("truncated", "50000")),
    "weights a pointer": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("model.safetensors", "git-lfs", "pull"),
    ),
    "weights a folder": (is_a_folder("model.safetensors"), ("model.safetensors",)),
    "weights random": (write("model.safetensors", b"\xfe" * 5000), ("header length",)),
    "offsets beyond": (
        lambda m: edit_header(m / "model.safetensors", beyond),
        ("model.norm.weight",),
    ),
    "offsets overlapping": (
        lambda m: edit_header(m / "model.safetensors", overlapping),
        ("overlap",),
    ),
    "shape": (reshape, ("down_proj.weight", "(32, 48)", "(32, 47)")),
    "tensor missing": (drop_tensor, ("down_proj.weight", "missing")),
    "shard missing": (make_index, ("model-00002-of-00002.safetensors", "missing")),
    "indexed tensor missing": (
        lambda m: make_index(m, "model.layers.7.extra"),
        ("model.layers.7.extra",),
    ),
    "index broken": (
        lambda m: [remove("model.safetensors")(m), write("model.safetensors.index.json", "{")(m)],
        ("model.safetensors.index.json", "not valid JSON"),
    ),
    "no tokenizer": (remove("tokenizer.json"), ("tokenizer.json", "no such file")),
    "tokenizer a pointer": (
        write("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("tokenizer.json: this is a git-lfs pointer; run `git lfs pull`",),
    ),
    "tokenizer config a web page": (
        write("tokenizer_config.json", "<!doctype html>"),
        ("tokenizer_config.json: this is a web page; download the file again",),
    ),
    "tokenizer cut": (truncate("tokenizer.json", 3000), ("tokenizer.json", "truncated")),
    "tokenizer not UTF-8": (write("tokenizer.json", b"\xff\xfe\x00"), ("tokenizer.json",)),
    "tokenizer config cut": (truncate("tokenizer_config.json", 20), ("tokenizer_config.json",)),
    "template broken": (
        lambda m: edit_json(m / "tokenizer_config.json", chat_template="{% for %}"),
        ("tokenizer_config.json", "not valid Jinja"),
    ),
    "template a number": (
        lambda m: edit_json(m / "tokenizer_config.json", chat_template=7),
        ("chat_template: expected the text of a template, got 7", "chat_template.jinja"),
    ),
    "template a list of lists": (
        lambda m: edit_json(m / "tokenizer_config.json", chat_template=[{"name": ["a"]}]),
        ("chat_template", "got ['a']"),
    ),
    "eos a text": (set_defaults(eos_token_id="</s>"), ("eos_token_id", "</s>")),
    "eos true": (set_defaults(eos_token_id=True), ("eos_token_id", "True")),
    "defaults cut": (
        truncate("generation_config.json", 5),
        ("generation_config.json: not valid JSON", "copy the file again"),
    ),
    "defaults negative": (
        set_defaults(do_sample=True, temperature=-1),
        ("generation_config.json", "temperature"),
    ),
    "defaults nan": (
        set_defaults(do_sample=True, top_k=float("nan")),
        ("generation_config.json", "top_k"),
    ),
    "defaults a text": (
        set_defaults(repetition_penalty="high"),
        ("generation_config.json", "repetition_penalty", "high"),
    ),
}


@pytest.mark.parametrize("damage", MODELS)
def test_damaged_model_directory(cli: Cli, model: Path, tmp_path: Path, damage: str) -> None:
    change, expected = MODELS[damage]
    change(model)
    commands: list[tuple[str, ...]] = [("generate", "--prompt", "a", "--quiet")]
    if damage in ("missing directory", "weights cut", "architecture", "tokenizer cut"):
        split = ("split", "--world-size", "2", "--out", str(tmp_path / "out"), "--quiet")
        commands += [("info",), split]
    for command in commands:
        result = cli(*command, "--model", str(model))
        assert result.code == 2, result
        for part in (*expected, str(tmp_path)):
            assert part in result.line
        assert result.out == ""
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[99].content }}", "failed"),
        (" \n", "no chat template"),
        ("None", ""),
    ],
)
def test_template_that_raises(cli: Cli, model: Path, template: str, expected: str) -> None:
    if template == "None":
        edit_json(model / "tokenizer_config.json", chat_template="REMOVED")
        expected = "no chat template"
    else:
        edit_json(model / "tokenizer_config.json", chat_template=template)
    result = cli("generate", "--model", str(model), "--chat", "--prompt", "a", "--quiet")
    assert result.code == 2
    assert expected in result.line
    assert str(model) in result.line


def test_weights_that_are_not_finite(cli: Cli, model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors")
    (tmp_path / "text").write_text("some text")
    for command in (
        ("generate", "--prompt", "a", "--temperature", "0"),
        ("generate", "--prompt", "a", "--temperature", "1"),
        ("chat", "--prompt", "a"),
        ("eval", "--text", str(tmp_path / "text")),
    ):
        result = cli(*command, "--model", str(model), "--quiet")
        assert (result.code, result.out.strip()) == (2, "")
        assert "not finite (nan)" in result.line
        assert "damaged" in result.line


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (300.0, "up to 217 for 4 bits, got 300; use int8; --quantize int8 or none"),
        (float("nan"), "got inf or nan; copy or download the file again"),
    ],
)
def test_weights_that_4_bits_cannot_store(
    cli: Cli, model: Path, tmp_path: Path, weight: float, words: str
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.weight"][1, 2] = weight
    save_file(tensors, model / "model.safetensors")
    options = ("--quantize", "int4", "--store", str(tmp_path / "store"), "--quiet")
    result = cli("generate", "--prompt", "a", "--model", str(model), *options)
    assert result.code == 2
    assert result.line.endswith(words)


# -- options ---------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[str, ...]] = {
    "--local 0": ("--local", "'0'"),
    "--local -1": ("--local",),
    "--local 1.5": ("--local", "'1.5'"),
    "--local 9": ("world size 9", "1 to 8", "8 attention heads"),
    "--local 99999999999999999999": ("--local",),
    "--local 2 --peers a:1": ("--peers", "not allowed with"),
    "--peers ,": ("--peers", "HOST:PORT"),
    "--peers 50051": ("--peers", "'50051'", "HOST:PORT"),
    "--peers a:": ("--peers", "HOST:PORT"),
    "--peers :1": ("--peers", "HOST:PORT"),
    "--peers a:0": ("--peers", "1 to 65535"),
    "--peers a:65536": ("--peers", "1 to 65535"),
    "--peers a:b": ("--peers", "HOST:PORT"),
    "--peers ::1:50051": ("--peers", "HOST:PORT"),
    "--peers a:1,b:": ("--peers", "'b:'"),
    "--peers a:1,a:1": ("--peers", "twice"),
    "--peers a,a:50051": ("--peers", "twice"),
    "--ratio 1,2": ("ratio 1,2", "expected 1"),
    "--local 2 --ratio 1": ("ratio 1", "expected 2"),
    "--local 2 --ratio 1,0": ("ratio", "rank 1", "above 0"),
    "--local 2 --ratio 1,-1": ("ratio", "rank 1"),
    "--local 2 --ratio nan,1": ("ratio", "rank 0", "nan"),
    "--local 2 --ratio inf,1": ("ratio", "rank 0", "inf"),
    "--ratio a,b": ("--ratio", "2,1,1"),
    "--ratio ": ("--ratio",),
    "--window 0": ("window 0", "at least 2"),
    "--window 1": ("window 1", "at least 2"),
    "--window -3": ("window -3", "at least 2"),
    "--window 99999999999": ("window", "99999999999"),
    "--window x": ("--window", "'x'"),
    "--memory 1M": ("memory limit of 1 MiB", "raise --memory to"),
    "--memory 0": ("--memory", "'0'"),
    "--memory -5G": ("--memory",),
    "--memory nan": ("--memory", "'nan'"),
    "--memory 9999999999999T": ("--memory",),
    "--memory " + "9" * 400: ("--memory",),
    "--dtype int8": ("--dtype", "'int8'"),
    "--kv int3": ("--kv", "'int3'"),
    "--threads 0": ("--threads", "'0'"),
    "--threads 5000": ("threads", "1024"),
    "--timeout 0": ("--timeout",),
    "--timeout -1": ("--timeout",),
    "--timeout nan": ("--timeout", "'nan'"),
    "--timeout inf": ("--timeout", "'inf'"),
    "--max-tokens 0": ("max_tokens", "at least 1", "got 0"),
    "--max-tokens -1": ("max_tokens", "got -1"),
    "--max-tokens x": ("--max-tokens",),
    "--temperature -1": ("temperature", "got -1"),
    "--temperature nan": ("temperature", "got nan"),
    "--temperature inf": ("temperature", "got inf"),
    "--top-k -1": ("top_k", "got -1"),
    "--top-p 0": ("top_p", "got 0"),
    "--top-p 1.5": ("top_p", "got 1.5"),
    "--top-p nan": ("top_p", "got nan"),
    "--min-p -0.1": ("min_p", "got -0.1"),
    "--min-p nan": ("min_p", "got nan"),
    "--repetition-penalty 0": ("repetition_penalty", "got 0"),
    "--repetition-penalty nan": ("repetition_penalty", "got nan"),
    "--seed -1": ("seed", "got -1"),
    "--seed 99999999999999999999": ("seed",),
    "--unknown 1": ("--unknown",),
}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o[:40])
def test_option_that_makes_no_sense(cli: Cli, whole: Path, option: str) -> None:
    before = {process.pid for process in descendants()}
    arguments = option.split(" ")
    result = cli("generate", "--model", str(whole), "--prompt", "abc", "--quiet", *arguments)
    assert result.code == 2, result
    for part in OPTIONS[option]:
        assert part in result.line
    assert {process.pid for process in descendants()} <= before


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_sampling_options_are_checked_before_a_model_is_looked_for(cli: Cli, command: str) -> None:
    result = cli(command, "--model", "/nowhere", "--prompt", "a", "--top-p", "3")
    assert result.code == 2
    assert "top_p: expected above 0" in result.line


def test_memory_that_is_too_little_says_how_much_is_needed(cli: Cli, whole: Path) -> None:
    from tpirt.units import parse_bytes

    def run(memory: int) -> Result:
        options = ("--max-tokens", "2", "--quiet", "--threads", "1", "--memory", str(memory))
        return cli("generate", "--model", str(whole), "--prompt", "a", *options)

    result = run(50 << 20)
    assert result.code == 2
    needed = parse_bytes(result.line.partition("raise --memory to ")[2])
    assert run(needed).code == 0


def test_prompts_that_cannot_be_served(
    cli: Cli, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> Result:
        return cli("generate", "--model", str(whole), "--quiet", "--threads", "1", *arguments)

    too_long = run("--prompt", "x" * 200)
    assert too_long.code == 2
    assert "200 tokens" in too_long.line
    assert "128" in too_long.line
    for nothing in (("--prompt", ""), ("--prompt-file", os.devnull)):
        assert run(*nothing).code == 2
    assert "empty" in run("--prompt", "").line
    assert "lone surrogate" in run("--prompt", "a\udcffb").line
    missing = run("--prompt-file", str(tmp_path / "none.txt"))
    assert (missing.code, "none.txt" in missing.line) == (2, True)
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    latin = run("--prompt-file", str(tmp_path / "latin.txt"))
    assert latin.code == 2
    assert "latin.txt: not UTF-8 text (byte 1)" in latin.line
    assert run("--prompt-file", str(tmp_path)).code == 2
    assert "required" in run().line
    assert "not allowed" in run("--prompt", "a", "--prompt-file", "b").line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("sing",), "sing"),
        (("info", "--world-size", "0"), "--world-size"),
        (("info", "--world-size", "9"), "world size 9"),
        (("info", "--world-size", "2", "--ratio", "1"), "ratio 1"),
        (("info", "--window", "1"), "window"),
        (("info", "--context", "100000"), "context 100000"),
        (("split", "--world-size", "0", "--out", "x"), "--world-size"),
        (("split", "--world-size", "-2", "--out", "x"), "--world-size"),
        (("split", "--world-size", "9", "--out", "x"), "world size 9"),
        (("split", "--world-size", "2"), "--out"),
        (("split", "--world-size", "2", "--out", "/dev/null/x", "--quiet"), "/dev/null/x"),
        (("peer", "--listen", "50051"), "--listen"),
        (("peer", "--listen", "127.0.0.1:99999"), "65535"),
        (("peer", "--listen", "192.0.2.1:5000"), "192.0.2.1:5000"),
        (("peer", "--listen", "127.0.0.1:0", "--memory", "-1"), "--memory"),
        (("peer", "--listen", "127.0.0.1:0", "--memory", "10M"), "raise --memory to"),
        (
            ("peer", "--listen", "127.0.0.1:0", "--store", "/dev/null/x"),
            "folder, but /dev/null is a file",
        ),
        (("store", "ls", "--store", "/dev/null"), "folder, but /dev/null is a file"),
        (("peer", "--listen", "no-such-host.invalid"), "no-such-host.invalid:50051"),
        (
            ("generate", "--store", "/dev/null", "--prompt", "a", "--quiet"),
            "/dev/null: expected a folder, but /dev/null is a file",
        ),
    ],
)
def test_other_commands(cli: Cli, arguments: tuple[str, ...], expected: str) -> None:
    result = cli(*arguments)
    assert result.code == 2, result
    assert expected in result.line


def test_current_folder_that_was_removed(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "current directory was removed; change to another" in cli("info").line


def test_name_that_the_system_refuses() -> None:
    result = run_cli("info", "--model", "a" * 300)
    assert result.returncode == 2
    assert result.stderr == f"tpirt: error: {'a' * 300}: File name too long\n"


# -- peers -----------------------------------------------------------------------------------


def generate_with(cli: Cli, whole: Path, peers: str) -> Result:
    return cli("generate", "--model", str(whole), "--prompt", "a", "--quiet", "--peers", peers)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_peer_that_is_not_there(cli: Cli, whole: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    result = generate_with(cli, whole, address)
    assert result.code == 3
    assert result.line.startswith(f"tpirt: error: peer {address}: nothing listens there")
    assert "is `tpirt peer` running there" in result.line


@pytest.mark.parametrize("host", [nightly("no-such-host.invalid"), "a..b", nightly("a" * 64)])
def test_peer_whose_name_is_unknown(cli: Cli, whole: Path, host: str) -> None:
    result = generate_with(cli, whole, host)
    assert result.code == 3
    assert re.search(
        f"peer {host}:50051: the host name (is unknown|cannot be looked up)", result.line
    )


def test_peer_whose_name_cannot_be_looked_up(
    cli: Cli, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    assert "cannot be looked up now; is this machine online?" in generate_with(cli, whole, "a").line


@pytest.fixture
def web_server() -> Iterator[str]:
    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_peer_that_is_something_else(cli: Cli, whole: Path, web_server: str) -> None:
    result = generate_with(cli, whole, web_server)
    assert result.code == 2
    assert f"peer {web_server}: something else than a tpirt peer answers there" in result.line


OTHER_VERSION = """
import sys
import tpirt.cluster.worker as worker
from tpirt.cli.main import main
worker.PROTOCOL_VERSION, worker.__version__ = 99, "9.9"
sys.exit(main(["peer", "--listen", "127.0.0.1:0", "--quiet", "--store", sys.argv[1]]))
"""


def test_peer_of_another_version(cli: Cli, whole: Path, tmp_path: Path) -> None:
    with killed_at_exit(
        start_python("-c", OTHER_VERSION, str(tmp_path), stdout=subprocess.PIPE, text=True)
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[2]
        result = generate_with(cli, whole, address)
    assert result.code == 2
    assert "runs tpirt 9.9 (protocol 99), this is tpirt " in result.line
    assert "update tpirt on this machine" in result.line
    assert f"peer {address}: " in result.line


def test_peer_that_is_busy_and_port_that_is_in_use(cli: Cli, whole: Path, tmp_path: Path) -> None:
    with PeerProcess(tmp_path / "peer") as peer:
        host, _, port = peer.address.rpartition(":")
        in_use = cli("peer", "--listen", peer.address, "--store", str(tmp_path / "other"))
        assert in_use.code == 2
        assert f"{host}:{port}" in in_use.line
        assert "in use" in in_use.line
        arguments = ("generate", "--model", str(whole), "--peers", peer.address, "--prompt", "a")
        with killed_at_exit(
            start_cli(*arguments, "--quiet", "--store", str(tmp_path / "master"))
        ) as master:
            wait_for(lambda: "serving" in peer.log)
            master.send_signal(signal.SIGSTOP)  # it holds the peer
            result = generate_with(cli, whole, peer.address)
            assert result.code == 3
            assert f"{port}: is busy with" in result.line
            master.send_signal(signal.SIGCONT)
            out, err = master.communicate(timeout=30)
            assert (master.returncode, err) == (0, "")
            assert len(out) > 1


# -- Ctrl-C ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage", ["starting peers", "slicing", "sending slice", "loading weights", "prefill"]
)
def test_interrupted_at_every_stage(whole: Path, tmp_path: Path, stage: str) -> None:
    store = tmp_path / "store"
    ranks = "1" if stage in ("slicing", "prefill") else "2"
    arguments = ["generate", "--model", str(whole), "--local", ranks, "--prompt", "a" * 50]
    arguments += ["--threads", "1", "--store", str(store), "--quiet"]
    with killed_at_exit(
        start_python(
            *("-c", INTERRUPTED, stage, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    ) as process:
        workers = []
        if ranks == "2":
            wait_for(lambda: process.poll() is not None or descendants(process.pid), stage)
            workers = descendants(process.pid)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "tpirt: interrupted\n")
    assert stage == "prefill" or not out
    assert survivors(workers) == []
    assert [path for path in store.glob(".*") if not path.name.startswith(".unfinished-")] == []
    whole_ones = len(list(store.glob("*/manifest.json")))
    # The thread that slices may be done by the time that the signal is handled.
    expected = {"slicing": (0, 1), "sending slice": (1,), "loading weights": (2,), "prefill": (1,)}
    assert whole_ones in expected.get(stage, (0,))


def test_interrupted_while_importing(whole: Path) -> None:
    cold = [sys.executable, "-m", "tpirt", "generate", "--model", str(whole), "--prompt", "a"]
    pipe = subprocess.PIPE
    with killed_at_exit(subprocess.Popen(cold, stdout=pipe, stderr=pipe, text=True)) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_for(lambda: "libtorch" in maps.read_text(), "importing torch")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "tpirt: interrupted\n")


def test_split_interrupted(whole: Path, tmp_path: Path) -> None:
    arguments = ["split", "--model", str(whole), "--world-size", "2", "--out", str(tmp_path)]
    result = run_python("-c", INTERRUPTED, "slicing", *arguments, "--quiet", text=True)
    assert (result.returncode, result.stderr) == (130, "tpirt: interrupted\n")
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in left if not path.parent.name.startswith(".unfinished-")] == []


# -- where the output goes -------------------------------------------------------------------


def output_to(target: IO[Any] | None, *arguments: str) -> tuple[int, str]:
    """Run the command with its output to a file; returns its exit code and its messages."""
    assert target is not None
    options = {"stdin": subprocess.DEVNULL, "stdout": target, "stderr": subprocess.PIPE}
    with killed_at_exit(start_python("-m", "tpirt", *arguments, text=True, **options)) as process:
        target.close()
        _, err = process.communicate(timeout=DEADLINE_S)
        return process.returncode, err


@pytest.fixture
def long_answer(whole: Path, tmp_path: Path) -> list[str]:
    generate = ["generate", "--model", str(whole), "--prompt", "abc", "--max-tokens", "100"]
    return [*generate, "--quiet", "--store", str(tmp_path)]


def test_output_that_nobody_reads(long_answer: list[str], whole: Path) -> None:
    for arguments in (long_answer, ["info", "--model", str(whole)]):
        head = ["head", "-c", "5"]
        with subprocess.Popen(head, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as reader:
            assert output_to(reader.stdin, *arguments) == (0, "")


def test_output_that_nobody_takes(long_answer: list[str]) -> None:
    error = "tpirt: error: cannot write the output: No space left on device\n"
    with open("/dev/full", "w") as full:
        assert output_to(full, *long_answer) == (2, error)


@pytest.mark.parametrize(("closed", "code"), [("2>&- <&-", 0), (">&- 2>&- <&-", 2)])
def test_closed_standard_streams(long_answer: list[str], closed: str, code: int) -> None:
    command = shlex.join([sys.executable, "-m", "tpirt", *long_answer])
    script = ["bash", "-c", f"{command} {closed}"]
    done = subprocess.run(script, timeout=DEADLINE_S, stdout=subprocess.DEVNULL)
    assert done.returncode == code


@pytest.mark.parametrize(
    "arguments", ["info", nightly("--help"), nightly("peer --help"), "--version"]
)
@pytest.mark.parametrize(
    ("output", "reason"), [(">&-", "Bad file descriptor"), ("> /dev/full", "No space left on")]
)
def test_output_that_is_lost_is_an_error(arguments: str, output: str, reason: str) -> None:
    script = ["bash", "-c", f"{sys.executable} -m tpirt {arguments} {output}"]
    done = subprocess.run(script, timeout=DEADLINE_S, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"tpirt: error: cannot write the output: {reason}")
    assert done.stderr.count("\n") == 1


def test_whole_command_is_what_was_tested_here(whole: Path) -> None:
    """The same through a process of its own, with its exit code and its streams."""
    result = run_cli("generate", "--model", str(whole / "none"), "--prompt", "a")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"tpirt: error: {whole / 'none'}: ")
    assert result.stderr.count("\n") == 1
