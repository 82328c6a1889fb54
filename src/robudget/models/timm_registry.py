"""Our architectures in timm's registry: import this module and `timm.create_model("robudget_wrn_28_10")` makes one.

As everywhere here they take images in [0, 1]: their first layer normalises. timm's `num_classes`, `in_chans` and
`img_size` are understood, and our own `activation`, `variant` and `base`.
"""

from __future__ import annotations

import sys
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from robudget.errors import InputError
from robudget.models.build import EXAMPLES, build

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10
NAMES = {f"robudget_{name.replace('-', '_')}": name for name in EXAMPLES}

# timm reads a model's configuration from this name of the module that registers it.
default_cfgs = generate_default_cfgs(
    {
        # The normalisation is inside, so timm's own transforms must not do it again.
        name: {"input_size": (3, 32, 32), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "num_classes": 10}
        for name in NAMES
    }
)
__all__ = list(NAMES)


def _entry(name: str, ours: str) -> Any:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise InputError(f"{name} has no published weights here (allowed: pretrained=False)")
        options.pop("pretrained_cfg", None)
        options.pop("pretrained_cfg_overlay", None)
        options.pop("cache_dir", None)
        channels = options.pop("in_chans", 3)
        mean, std = (_MEAN, _STD) if channels == 3 else (None, None)
        return build(
            ours,
            classes=options.pop("num_classes", 10),
            image_size=options.pop("img_size", 32),
            channels=channels,
            mean=options.pop("mean", mean),
            std=options.pop("std", std),
            **options,
        )

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    return register_model(create)


for _name, _ours in NAMES.items():
    setattr(sys.modules[__name__], _name, _entry(_name, _ours))
