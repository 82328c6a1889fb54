"""A classifier from what a user can name: weights and an architecture, a timm model, RobustBench, their function."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from robudget.errors import InputError, unknown
from robudget.models.build import ImageSpec, build
from robudget.models.layers import Normalize, Normalized

FORMS = (
    "a run's folder, weights.safetensors with --model NAME, a timm model, robustbench:DATASET/THREAT/NAME, "
    "FILE.py:FUNCTION"
)


def load_classifier(source: str, spec: ImageSpec, *, model: str | None = None) -> Callable[[Tensor], Tensor]:
    """The classifier that `source` names, in eval mode, for images of `spec` in [0, 1].

    - `weights.safetensors`, with `model` an architecture that `models.build` knows (normalised as the dataset is);
    - `robustbench:<dataset>/<threat>/<name>`, where that extra is installed and the weights are on this machine;
    - `<file.py>:<function>` or `<package.module>:<function>`: called without arguments, returns the classifier;
    - the name of a timm model, with its published weights (from timm's cache).

    Raises InputError for anything else, and for weights that do not fit.
    """
    if source.startswith("robustbench:"):
        return _robustbench(source.removeprefix("robustbench:"))
    if Path(source).suffix == ".safetensors":
        return _safetensors(Path(source), spec, model)
    if ":" in source:
        return _function(source)
    return _timm(source, spec)


def _safetensors(path: Path, spec: ImageSpec, name: str | None) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if name is None:
        raise InputError(f"{str(path)!r} holds weights only: name its architecture (--model wrn-28-10)")
    if not path.exists():
        raise InputError(f"no such file: {str(path)!r}")
    channels, size, _ = spec.image_shape
    network = build(name, classes=spec.classes, image_size=size, channels=channels, mean=spec.mean, std=spec.std)
    try:
        network.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise InputError(f"{str(path)!r} is not a safetensors file: {error}") from None
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise InputError(f"{str(path)!r} does not fit {name}: {' '.join(lines[1].split())[:200]}") from None
    return network.eval()


def _robustbench(name: str) -> Callable[[Tensor], Tensor]:
    parts = name.split("/")
    if len(parts) != 3:
        raise InputError(f"robustbench:{name} is not robustbench:DATASET/THREAT/NAME (e.g. cifar10/Linf/Standard)")
    try:
        from robustbench.utils import load_model
    except ImportError:
        raise InputError("robustbench is not installed (pip install 'robudget[robustbench]')") from None
    dataset, threat, entry = parts
    network: nn.Module = load_model(entry, dataset=dataset, threat_model=threat)
    return network.eval()


def _function(source: str) -> Callable[[Tensor], Tensor]:
    where, _, name = source.rpartition(":")
    module = _module(where)
    made = getattr(module, name, None)
    if made is None:
        raise unknown(f"function in {where}", name, [n for n in dir(module) if not n.startswith("_")])
    classifier: Any = made if isinstance(made, nn.Module) else made()
    if not callable(classifier):
        raise InputError(f"{source} returned {type(classifier).__name__}, not a classifier (images -> logits)")
    return classifier.eval() if isinstance(classifier, nn.Module) else classifier


def _module(where: str) -> ModuleType:
    if where.endswith(".py"):
        path = Path(where)
        if not path.exists():
            raise InputError(f"no such file: {where!r}")
        description = importlib.util.spec_from_file_location(path.stem, path)
        assert description is not None
        assert description.loader is not None
        module = importlib.util.module_from_spec(description)
        sys.modules[path.stem] = module  # so that classes in the file can be found by their module's name
        description.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise InputError(f"cannot import {where!r}: {error}") from None


def _timm(name: str, spec: ImageSpec) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise InputError(f"cannot evaluate {name!r} (allowed: {FORMS})")
    try:
        body = timm.create_model(name, pretrained=True, num_classes=spec.classes, in_chans=spec.image_shape[0])
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"timm cannot load {name!r} with its weights: {str(error).splitlines()[0]}") from None
    settings: dict[str, Any] = vars(body)["pretrained_cfg"]
    return Normalized(Normalize(settings["mean"], settings["std"]), body).eval()
