"""A GPU that is not there, or no longer, or too small: why, in one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from robudget.attacks.victim import out_of_memory
from robudget.errors import OutOfMemory, RunFailed, first_line

_OF_A_GPU = ("CUDA error", "CUDA driver error", "CUDNN_STATUS_", "CUBLAS_STATUS_", "NVML_SUCCESS")


@contextmanager
def answering() -> Iterator[None]:
    """Inside, an error of the GPU itself (lost, faulty, a kernel that crashed) becomes a RunFailed of one line, and a
    lack of memory that nothing inside could mend an OutOfMemory.

    An error of the GPU itself stays: no later call of this process is answered.
    """
    try:
        yield
    except RuntimeError as error:
        cause = first_line(error)
        if out_of_memory(error):
            hint = "try a smaller batch or model, of a training checkpointing=true too"
            raise OutOfMemory(f"out of memory ({cause}); {hint}; run again to go on from what was saved") from error
        if not any(text in cause for text in _OF_A_GPU):
            raise
        raise RunFailed(f"the GPU stopped answering ({cause}); run again to go on from what was saved") from error


def current(device: torch.device) -> AbstractContextManager[object]:
    """Inside, a GPU with a number is torch's current one: else events and a context of their own go to GPU 0."""
    numbered = device.type == "cuda" and device.index is not None
    return torch.cuda.device(device) if numbered else nullcontext()


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
