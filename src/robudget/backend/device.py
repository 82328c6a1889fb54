"""A GPU that is not there, or no longer: why, in one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robudget.attacks.victim import out_of_memory
from robudget.errors import RunFailed, first_line

_OF_A_GPU = ("CUDA error", "CUDA driver error", "CUDNN_STATUS_", "CUBLAS_STATUS_", "NVML_SUCCESS")


@contextmanager
def answering() -> Iterator[None]:
    """Inside, an error of the GPU itself (lost, faulty, a kernel that crashed) becomes a RunFailed of one line.

    Such an error stays: no later call of this process is answered. Running out of memory is no such error.
    """
    try:
        yield
    except RuntimeError as error:
        cause = first_line(error)
        if out_of_memory(error) or not any(text in cause for text in _OF_A_GPU):
            raise
        raise RunFailed(f"the GPU stopped answering ({cause}); run again to go on from what was saved") from error


def why_no_gpu() -> str:
    """What torch says where it sees no GPU: built without CUDA, or a driver that is missing, too old or of two
    versions."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return f"torch is built with CUDA {torch.version.cuda} and sees no GPU"
