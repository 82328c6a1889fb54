"""What a training leaves on disk: `last.pt` to go on from, `previous.pt` behind it, `best.safetensors` to use.

`last.pt` is a `torch.save` of plain data and tensors, loaded with `weights_only=True`, so that a hostile file can't
run code. It carries a SHA-256 of its own content: a flipped bit or a truncated file is recognised, and the
one before it is used.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from robudget import files
from robudget.errors import InputError
from robudget.models.build import ImageSpec, build_for
from robudget.recipe import Recipe

FORMAT = 1
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.safetensors"

State = dict[str, Any]


def copied(value: Any) -> Any:
    """A copy of nested dicts and lists with every tensor copied to the CPU's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(item) for item in value]
    return value


def digest(value: Any) -> str:
    """SHA-256 of nested dicts, lists, numbers, strings and tensors, independent of how a file lays them out."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        sha.update(f"t{plain.dtype}{tuple(plain.shape)}".encode())
        sha.update(np.ascontiguousarray(plain.reshape(-1).view(torch.uint8).numpy()).data)
    elif isinstance(value, Mapping):
        sha.update(f"d{len(value)}".encode())
        for key in sorted(value, key=str):
            _feed(sha, key)
            _feed(sha, value[key])
    elif isinstance(value, (list, tuple)):
        sha.update(f"l{len(value)}".encode())
        for item in value:
            _feed(sha, item)
    elif isinstance(value, float):
        sha.update(b"f" + struct.pack("<d", value))
    elif value is None or isinstance(value, (bool, int, str)):
        sha.update(f"{type(value).__name__}{value!r}".encode())
    else:
        raise TypeError(f"a checkpoint can't hold {type(value).__name__}")


class Writer:
    """Does one writing after the other, in a thread of its own where asked, so that training goes on meanwhile.

    What a writing raised is raised by the next call or by `wait`. The interpreter waits for the thread at its end.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __call__(self, write: Callable[[], None], *, background: bool) -> None:
        self.wait()
        if not background:
            write()
            return
        self._thread = threading.Thread(target=self._run, args=(write,), name="robudget-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when everything is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._error = error


def save_last(folder: Path, state: State) -> None:
    """Write `last.pt` atomically, keeping the one before it as `previous.pt`."""
    whole = {"format": FORMAT, "state": state, "sha256": digest(state)}

    def write(temporary: Path) -> None:
        torch.save(whole, temporary)
        last = folder / LAST
        # At every instant one of the two names holds a complete checkpoint.
        if last.exists():
            last.replace(folder / PREVIOUS)

    files.replace(folder / LAST, write)


def load_last(folder: Path, notify: Callable[[str], None]) -> State | None:
    """The newest intact state in `folder`, or None where no checkpoint was ever written.

    A damaged `last.pt` is passed over for `previous.pt`, and `notify` is told. Raises InputError when files are there
    and none is usable.
    """
    paths = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    problems = []
    for path in paths:
        try:
            state = _read(path)
        except InputError as error:
            problems.append(str(error))
            continue
        if problems:
            notify(f"{problems[0]}; going on from {path.name} (step {state['step']})")
        return state
    if paths:
        raise InputError(f"{problems[0]}; no usable checkpoint in {str(folder)!r} (delete its *.pt to start afresh)")
    return None


def check_setting(state: State, recipe_id: str, setting: Mapping[str, str | int | bool], where: str) -> None:
    """Raise InputError where `state` is of another recipe, or was made under other circumstances than `setting`."""
    if state["recipe_id"] != recipe_id:
        raise InputError(f"{where} is of recipe {state['recipe_id']}, not {recipe_id}")
    for name, mine in setting.items():
        if (theirs := state["setting"].get(name)) != mine:
            raise InputError(f"{where} was made with {name} = {theirs}, this run has {mine}")


def _read(path: Path) -> State:
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"checkpoint {str(path)!r} is damaged or holds more than tensors and plain data") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        # What a damaged file makes the reader stumble over depends on where the damage is.
        reason = " ".join(str(error).split())[:120] or "empty"
        raise InputError(f"checkpoint {str(path)!r} is damaged: {reason}") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT or not isinstance(whole.get("state"), dict):
        raise InputError(f"checkpoint {str(path)!r} is not one of this version of robudget")
    if whole.get("sha256") != digest(whole["state"]):
        raise InputError(f"checkpoint {str(path)!r} is damaged: its checksum does not match")
    state: State = whole["state"]
    return state


def save_weights(path: Path, weights: Mapping[str, Tensor], recipe: Recipe, metadata: Mapping[str, str]) -> None:
    """Weights as safetensors, atomically; the recipe travels in the metadata (`recipe`: YAML, `recipe_id`)."""
    # Copies: safetensors refuses memory that two names share, as tied weights do.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    about = {"recipe": recipe.to_yaml(), "recipe_id": recipe.id, **metadata}
    files.replace(path, lambda temporary: save_file(plain, temporary, metadata=about))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(weights, metadata) of a safetensors file. Raises InputError where it is missing or damaged."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return weights, dict(file.metadata() or {})
    except FileNotFoundError:
        raise InputError(f"no weights at {str(path)!r}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights {str(path)!r} are damaged: {error}") from None


def misfit(weights: Mapping[str, Tensor], model: nn.Module) -> str:
    """What keeps `weights` from being the model's, e.g. "head.weight is (7, 8), not (10, 8)"; "" where nothing does."""
    shapes, needed = ({name: tuple(t.shape) for name, t in w.items()} for w in (weights, model.state_dict()))
    odd = [name for name in needed if shapes.get(name) != needed[name]] or [n for n in shapes if n not in needed]
    return f"{odd[-1]} is {shapes.get(odd[-1])}, not {needed.get(odd[-1])}" if odd else ""


def begun(folder: Path | None) -> bool:
    """Is there a checkpoint to go on from?"""
    return folder is not None and any((folder / name).exists() for name in (LAST, PREVIOUS))


def start_from(model: nn.Module, recipe: Recipe, path: str | None) -> None:
    """Load the weights that `recipe.model.init` asks for from `path`.

    Raises InputError where no file is named, where it is another one, or of another architecture or other classes."""
    asked = recipe.model.init
    if path is None:
        raise InputError(f"model.init = {asked!r} needs model.weights=<the file of this SHA-256>")
    weights, _ = load_weights(Path(path))
    if (found := files.sha256(Path(path))) != asked:
        raise InputError(f"model.weights = {path!r} has the SHA-256 {found}, not model.init = {asked!r}")
    if why := misfit(weights, model):
        raise InputError(f"model.weights = {path!r} are of another model than {recipe.model.name!r} here: {why}")
    model.load_state_dict(weights)


def best_model(recipe: Recipe, spec: ImageSpec, path: Path) -> nn.Module:
    """A new model in eval mode with the weights of `path` (a run's best.safetensors), contiguous float32, on the CPU.

    Raises InputError where they are missing or damaged.
    """
    model = build_for(recipe, spec)
    weights, _ = load_weights(path)
    model.load_state_dict(weights)
    return model.eval()
