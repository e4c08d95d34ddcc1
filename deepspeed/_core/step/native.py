"""The Adam step on the CPU as one loop, built by the machine's C compiler at its first large step.

[Note: why there is C here]
The limit is memory bandwidth, and torch's fused CPU kernel does not reach it: one thread, 33M fp32 elements, quiet
machine: fused 22.9 GB/s; fused over tiles with 16-bit gradients and weights 0.83 to 0.93 of that; one plain loop 1.25
times it (more where memory is contended, where the reference's own kernel is up to 1.8 times as fast as the fused call).
``torch.compile`` makes an equally fast loop, but costs each process 4 to 11 seconds and 150 MB at its first step. This
loop takes half a second to build and no memory. ``benchmarks/cpu_adam.py`` measures it.

It stays optional: it is used for large fp32 CPU tensors only, and where there is no compiler, or ``DS_NATIVE_STEP=0``
is set, the tiles of ``kernels.py`` do the same math (results differ in the last bit). The library is unlinked as soon
as it is loaded, so nothing is left on disk. Threads are Python's, each calling the loop on its part with the
interpreter lock released: a second OpenMP runtime beside torch's would fight it for the cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deepspeed.utils.logging import log_dist

__all__ = ["MIN_NUMEL", "native_adam_", "replicas_agree", "takes"]

MIN_NUMEL = 1 << 20
"""Elements of a tensor from which the loop is worth building: below it a step takes less than a millisecond."""

_PART_ALIGN = 1024  # elements; parts of threads start on own cache lines of every tensor

_SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float from_bf16(uint16_t b) {
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint16_t to_bf16(float f) { /* round to nearest even, as torch does; NaN stays NaN */
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return f != f ? 0x7fc0 : (uint16_t)rounded;
}

#define STEP(NAME, GRAD_T, READ, WRITE)                                                                  \
    void NAME(float *restrict p, const GRAD_T *restrict g, float *restrict m, float *restrict v,         \
              uint16_t *restrict out, int64_t n, const float *restrict h) {                              \
        const float scale = h[0], a1 = h[1], b2 = h[2], a2 = h[3], keep = h[4], l2 = h[5], rate = h[6],  \
                    inv_c2 = h[7], eps = h[8];                                                           \
        for (int64_t i = 0; i < n; i++) {                                                                \
            float old = p[i];                                                                            \
            float grad = READ(g[i]) * scale;                                                             \
            if (l2 != 0.0f) grad += l2 * old; /* not 0 * inf = NaN */                                    \
            float m1 = m[i] + a1 * (grad - m[i]);                                                        \
            float v1 = b2 * v[i] + a2 * grad * grad;                                                     \
            float w = old * keep - rate * m1 / (sqrtf(v1) * inv_c2 + eps);                               \
            m[i] = m1;                                                                                   \
            v[i] = v1;                                                                                   \
            p[i] = w;                                                                                    \
            WRITE                                                                                        \
        }                                                                                                \
    }

STEP(adam_f32, float, , )
STEP(adam_f32_out, float, , out[i] = to_bf16(w);)
STEP(adam_bf16, uint16_t, from_bf16, )
STEP(adam_bf16_out, uint16_t, from_bf16, out[i] = to_bf16(w);)
"""

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
_build_lock = threading.Lock()


class _Local(threading.local):
    allowed = True


_local = _Local()


@contextlib.contextmanager
def replicas_agree() -> Iterator[None]:
    """Inside, this thread uses torch's kernels only.

    For weights that every rank updates by itself (stage 0): one rank with a compiler and one without would drift apart.
    """
    before, _local.allowed = _local.allowed, False
    try:
        yield
    finally:
        _local.allowed = before


def takes(p: Tensor, grad: Tensor, states: Sequence[Tensor], lowp_out: Tensor | None) -> bool:
    """True if the loop can update these flat tensors and is worth it. Builds it if it is the first time."""
    return (
        _local.allowed
        and p.numel() >= MIN_NUMEL
        and p.device.type == "cpu"
        and all(t.dtype == torch.float32 for t in (p, *states))
        and grad.dtype in (torch.float32, torch.bfloat16)
        and (lowp_out is None or lowp_out.dtype == torch.bfloat16)
        and os.environ.get("DS_NATIVE_STEP", "1") != "0"
        and _library() is not None
    )


def native_adam_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    bias_correction: bool,
    grad_scale: float,
    lowp_out: Tensor | None,
) -> None:
    """As ``kernels.adam_``, for tensors that :func:`takes` accepted: 1-D, contiguous, on the CPU."""
    beta1, beta2 = betas
    correction1 = 1.0 - beta1**step if bias_correction else 1.0
    correction2 = 1.0 - beta2**step if bias_correction else 1.0
    scalars = (ctypes.c_float * 9)(
        grad_scale,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        1.0 - lr * weight_decay if decoupled else 1.0,
        0.0 if decoupled else weight_decay,
        lr / correction1,
        1.0 / math.sqrt(correction2),
        eps,
    )
    library = _library()
    if library is None:
        raise AssertionError("native_adam_ was called although takes() was False; please report this")
    name = "adam_" + ("f32" if grad.dtype == torch.float32 else "bf16") + ("" if lowp_out is None else "_out")
    loop = getattr(library, name)
    tensors = (p, grad, exp_avg, exp_avg_sq)

    def part(start: int, stop: int) -> None:
        addresses = [ctypes.c_void_p(t.data_ptr() + start * t.element_size()) for t in tensors]
        out = None if lowp_out is None else ctypes.c_void_p(lowp_out.data_ptr() + start * lowp_out.element_size())
        loop(*addresses, out, ctypes.c_int64(stop - start), scalars)

    _in_parts(part, p.numel(), torch.get_num_threads())


def _in_parts(part: Callable[[int, int], None], numel: int, threads: int) -> None:
    """Calls ``part(start, stop)`` on ``threads`` threads, this one among them, so that the parts cover ``numel``."""
    size = -(-numel // threads)
    size = -(-size // _PART_ALIGN) * _PART_ALIGN
    bounds = [(start, min(start + size, numel)) for start in range(0, numel, size)]
    helpers = [threading.Thread(target=part, args=b) for b in bounds[1:]]
    for helper in helpers:
        helper.start()
    part(*bounds[0])
    for helper in helpers:
        helper.join()


def _library() -> ctypes.CDLL | None:
    with _build_lock:
        return _build()


@functools.cache
def _build() -> ctypes.CDLL | None:
    """The loaded library, or None (said once in the log) where it cannot be built."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if platform.system() != "Linux" or compiler is None:
        log_dist("CPU Adam: no C compiler found; torch's fused kernel is used over tiles")
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="deepspeed_step_") as folder:
            source, target = os.path.join(folder, "adam.c"), os.path.join(folder, "adam.so")
            with open(source, "w", encoding="ascii") as file:
                file.write(_SOURCE)
            command = [*compiler.split(), *_FLAGS, source, "-o", target, "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            return ctypes.CDLL(target)
    except (OSError, subprocess.SubprocessError) as error:
        log_dist(f"CPU Adam: the C compiler failed ({error}); torch's fused kernel is used over tiles")
        return None
