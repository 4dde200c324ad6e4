"""Numbers below the smallest normal one (1.2e-38 in fp32) count as zero while a model computes.

A CPU computes with them by microcode, many times slower, and some recipes make millions: with
Adam, weight decay as part of the gradient lets the weights and the momentum of a filter that
never fires sink there, and rounding keeps them from zero. `benchmarks/subnormals.py` has the cost.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FENV_BYTES = 256  # more than a `fenv_t` of C takes anywhere


@contextmanager
def subnormals_as_zero() -> Iterator[None]:
    """Takes and gives zero for subnormal numbers, in this thread and those PyTorch computes with.

    Only inside, for NumPy and Python then compute so too. PyTorch's own switch is that of the
    calling thread and of threads begun later; those at work already are told through OpenMP. Where
    that is not to be had (macOS, Windows) they go on as before. Changes nothing on a GPU.
    """
    before = _environment()
    torch.set_flush_denormal(True)
    _give_to_threads(_environment())
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        _give_to_threads(before)


def _environment() -> "ctypes.Array[ctypes.c_char] | None":
    """This thread's floating-point environment, a `fenv_t`; None without OpenMP to give it to."""
    found = ctypes.create_string_buffer(FENV_BYTES)
    return found if _C is not None and _C.fegetenv(found) == 0 else None


def _give_to_threads(environment: "ctypes.Array[ctypes.c_char] | None") -> None:
    """Makes it that of every thread in the caller's OpenMP team, the caller's among them."""
    if _C is not None and environment is not None:
        setter = ctypes.cast(_C.fesetenv, ctypes.c_void_p)
        _C.GOMP_parallel(setter, environment, ctypes.c_uint(torch.get_num_threads()), 0)


def _open_c() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)  # the C library and the OpenMP runtime that PyTorch brought
    except TypeError:  # Windows has no such handle
        return None
    return library if hasattr(library, "GOMP_parallel") and hasattr(library, "fesetenv") else None


_C = _open_c()
