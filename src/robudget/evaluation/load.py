"""A classifier from what a user can name: weights and an architecture, a timm model, RobustBench, their function."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from robudget.datasets import Preprocessing
from robudget.errors import InputError, hint, unknown
from robudget.models.build import ImageSpec, build, build_for
from robudget.models.preact import Normalize, Normalized
from robudget.recipe import Recipe

FORMS = (
    "a run's folder, weights.safetensors with --model NAME, a timm model, robustbench:DATASET/THREAT/NAME, "
    "FILE.py:FUNCTION"
)


def load_classifier(source: str, spec: ImageSpec, *, model: str | None = None) -> Callable[[Tensor], Tensor]:
    """The classifier that `source` names, in eval mode, for images of `spec` in [0, 1].

    - `weights.safetensors`, with `model` an architecture that `models.build` knows (normalised as the dataset is), or
      with their recipe inside, as a run leaves them;
    - `robustbench:<dataset>/<threat>/<name>`, where that extra is installed and the weights are on this machine;
    - `<file.py>:<function>` or `<package.module>:<function>`: called without arguments, returns the classifier;
    - the name of a timm model whose published weights tell as many classes apart as the data have.

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
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise InputError(f"no such file: {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            recipe = (file.metadata() or {}).get("recipe")
    except SafetensorError as error:
        raise InputError(f"{str(path)!r} is not a safetensors file: {error}") from None
    if name is not None:
        channels, size, _ = spec.image_shape
        network = build(name, classes=spec.classes, image_size=size, channels=channels, mean=spec.mean, std=spec.std)
    elif recipe is not None:
        network = build_for(Recipe.from_yaml(recipe, where=str(path)), spec)
    else:
        raise InputError(f"{str(path)!r} holds weights only: name its architecture (--model wrn-28-10)")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise InputError(
            f"{str(path)!r} does not fit {name or 'its recipe'}: {' '.join(lines[1].split())[:200]}"
        ) from None
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


def load_surrogate(source: str, spec: ImageSpec, classifier: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The surrogate that `source` names, for gradients in place of the classifier's: all that `load_classifier` takes,
    and `FILE.py:FUNCTION` may take the classifier as its argument. Raises InputError."""
    if ":" in source and not source.startswith("robustbench:"):
        return _function(source, classifier)
    return load_classifier(source, spec)


def _function(source: str, classifier: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """What a function returns, called without arguments, or with `classifier` where it wants one and there is one."""
    where, _, name = source.rpartition(":")
    module = _module(where)
    value = getattr(module, name, None)
    if value is None:
        raise unknown(f"function in {where}", name, [n for n in dir(module) if not n.startswith("_")])
    if not callable(value):
        raise InputError(f"{source} is {type(value).__name__} (allowed: a module, or a function that returns one)")
    arguments = () if classifier is None or not _wants_argument(value) else (classifier,)
    try:
        found: Any = value if isinstance(value, nn.Module) else value(*arguments)
    except TypeError as error:
        how = "with the model" if arguments else "without arguments"
        raise InputError(f"{source} cannot be called {how}: {error}") from None
    if not callable(found):
        raise InputError(f"{source} returned {type(found).__name__}, not a classifier (images -> logits)")
    return found.eval() if isinstance(found, nn.Module) else found


def _wants_argument(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


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
        near = hint(name, timm.list_models(), 0.6)
        raise InputError(f"cannot evaluate {name!r}{near} (allowed: {FORMS})")
    published = timm.get_pretrained_cfg(name)
    if published is None:
        raise InputError(f"timm has no weights for {name!r} (allowed: weights.safetensors with --model {name})")
    # timm would replace a head for other classes by a random one, and the numbers would mean nothing.
    if published.num_classes != spec.classes:
        raise InputError(
            f"timm's {name!r} tells {published.num_classes} classes apart, and the data have {spec.classes} "
            f"(allowed: weights.safetensors with --model {name}, or data with these classes)"
        )
    try:
        body = timm.create_model(name, pretrained=True, in_chans=spec.image_shape[0])
    # Whatever keeps the weights from being fetched or read: no network, no such file, a library that is missing.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"timm cannot load {name!r} with its weights: {reason}") from None
    return Normalized(Normalize(published.mean, published.std), body).eval()


def preprocessing_of(source: str) -> Preprocessing:
    """How the classifier that `source` names wants ImageNet's pictures, as RobustBench prepares them: by timm's
    configuration of the model, by RobustBench's entry for one of its models, else Res256Crop224."""
    import timm

    name = source
    if source.startswith("robustbench:"):
        dataset, threat, entry = [*source.removeprefix("robustbench:").split("/"), "", ""][:3]
        name = f"{entry}_{dataset}_{threat}".lower().replace("-", "_")
        if not timm.is_model(name):
            try:
                from robustbench.model_zoo import model_dicts
                from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

                chosen = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat)][entry].get("preprocessing")
                return Preprocessing() if chosen is None else Preprocessing.parse(chosen)
            except (ImportError, KeyError, ValueError):  # the model itself will not be found either
                return Preprocessing()
    published = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if published is None:
        return Preprocessing()
    size = published.input_size[1]
    return Preprocessing(math.floor(size / published.crop_pct), size, published.interpolation)
