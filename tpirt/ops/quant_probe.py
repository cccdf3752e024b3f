"""Measure which kernels are the fastest for a shape on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from tpirt.ops.plain_kernels import FEW as PLAIN_FEW
from tpirt.ops.plain_kernels import MANY as PLAIN_MANY
from tpirt.ops.quant import QuantSpec, Scheme
from tpirt.ops.quant_kernels import DENSE, EXACT, NATIVE
from tpirt.ops.quant_linear import FEW_ROWS, KernelChoice, linear
from tpirt.ops.quant_matrix import QuantMatrix
from tpirt.ops.quant_regions import matrix_regions, regions_nbytes
from tpirt.ops.tiles import TILE_ROWS

# Rows of input that the probe measures, and possible thresholds.
_PROBED_ROWS = (1, 32, 128)
_THRESHOLDS = (FEW_ROWS, 32, 64, 128, 256, 512, 1024)
# Maximum weights of a probed matrix, and minimum time of a measurement.
_PROBED_WEIGHTS = 1 << 22
_PROBE_S = 0.006
# By how much the dense kernel must be faster in one thread to be so in several: torch's products
# gain less from a second thread.
_DENSE_GAIN = 1.25

_setting_threads = threading.Lock()


def probe_kernels(
    spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype = torch.bfloat16
) -> KernelChoice:
    """Choose the kernels of a matrix by measuring them on this machine.

    At most 4 Mi weights are multiplied, 0.15 s of work; timings are scaled to the whole matrix.
    Measurements are noisy and bits depend on the choice: probe once per shape and store the result
    with the weights. Thresholds are powers of two, which hides most noise. CPU time of one thread
    is measured, not wall time, because other processes may be busy, such as ranks that probe too.

    May be called from any thread; other threads keep their number of torch threads.

    Args:
        spec: how the weights are stored.
        dtype: of those without a scheme, 16 bits. With float32, inputs of quantized weights must
            not be rounded: products are in float32.
    """
    if dtype is torch.float32:
        return KernelChoice((), EXACT.name)
    gain = _DENSE_GAIN if torch.get_num_threads() > 1 else 1.0
    with ThreadPoolExecutor(1, "tpirt-probe", initializer=_use_one_thread) as pool:
        return pool.submit(_probe, spec, out_features, in_features, dtype, gain).result()


def _probe(
    spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype, gain: float
) -> KernelChoice:
    weight, rows = _probe_weight(spec, out_features, in_features, dtype)
    scale = out_features / max(1, rows)
    few, many = (PLAIN_FEW, PLAIN_MANY) if isinstance(weight, torch.Tensor) else ((NATIVE,), DENSE)

    def measure(name: str, count: int) -> float:
        x = torch.full((count, in_features), 0.5)
        return scale * _time_ms(lambda: linear(x, weight, KernelChoice((), name)))

    dense = min((kernel.name for kernel in many), key=lambda name: measure(name, 32))
    names = [kernel.name for kernel in few if kernel.accepts(spec)] + [dense]
    return choose_by_time(
        {name: {n: measure(name, n) for n in _PROBED_ROWS} for name in names}, dense, gain
    )


def choose_by_time(
    timings_ms: dict[str, dict[int, float]], dense: str, gain: float = 1.0
) -> KernelChoice:
    """Choose the fastest kernels for few rows, up to where ``dense`` is faster.

    Up to ``FEW_ROWS`` it is the fastest one for one row.

    Args:
        timings_ms: by kernel name and rows of input; interpolated linearly.
        dense: the kernel for more rows.
        gain: how many times faster it must be.
    """
    others = [name for name in timings_ms if name != dense]
    steps: list[tuple[int, str]] = []
    for most in _THRESHOLDS:
        rows = 1 if most <= FEW_ROWS else most
        fastest = min(others, key=lambda name: _at(timings_ms[name], rows), default=dense)
        if fastest == dense or _at(timings_ms[fastest], rows) > gain * _at(timings_ms[dense], rows):
            break
        if steps and steps[-1][1] == fastest:
            steps.pop()
        steps.append((most, fastest))
    return KernelChoice(tuple(steps), dense, timings_ms)


def _at(times: Mapping[int, float], rows: int) -> float:
    counts = sorted(times)
    above = min((i for i, count in enumerate(counts) if count >= rows), default=len(counts) - 1)
    low, high = counts[max(0, above - 1)], counts[max(1, above)]
    return times[low] + (times[high] - times[low]) * (rows - low) / (high - low)


def _use_one_thread() -> None:
    """Make torch use only the calling thread, which must be new.

    ``set_num_threads`` applies to the calling thread and to threads that have not used torch yet.
    A short-lived thread restores the number for the latter.
    """
    with _setting_threads:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(before,))
        restore.start()
        restore.join()


def _probe_weight(
    spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[torch.Tensor | QuantMatrix, int]:
    """Weights of that form, some rows of them, and their number."""
    width = max(1, spec.padded_in_features(in_features))
    blocks = max(1, _PROBED_WEIGHTS // width // TILE_ROWS)
    rows = min(out_features, blocks * TILE_ROWS)
    if not isinstance(spec, Scheme):
        return torch.full((rows, in_features), 0.02, dtype=dtype), rows
    regions = matrix_regions(spec, rows, in_features)
    buffer = torch.arange(regions_nbytes(regions), dtype=torch.int32).remainder_(251)
    matrix = QuantMatrix.of_buffer(spec, rows, in_features, buffer.to(torch.uint8))
    matrix.scales.copy_(spec.even_scales(regions[1], rows, 0.02))
    return matrix, rows


def _time_ms(work: Callable[[], object]) -> float:
    """CPU time of the shortest of at least three runs after a first one."""
    work()
    shortest, spent = float("inf"), 0.0
    for count in range(50):
        start = time.thread_time()
        work()
        lasted = time.thread_time() - start
        shortest, spent = min(shortest, lasted), spent + lasted
        if count > 1 and spent > _PROBE_S:
            break
    return shortest * 1e3
