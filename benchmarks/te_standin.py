"""Lets megatron-bridge and mbridge be imported where Transformer Engine is not installed.

Both import it at their top, and megatron-core does not: here it decides first that there is none, and takes its own
layers. Then names of Transformer Engine stand for classes that cannot be made, so whatever would compute with it fails
by its name. Nothing of a peer is replaced.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NOTE = (
    "no Transformer Engine: names stand for it, layers are megatron-core's own; megatron_rl/device.py stands for CUDA"
)
_NAME = "transformer_engine"


class _Absent(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = _Absent(f"{self.__name__}.{name}") if name[0].islower() else _absent_class(self.__name__, name)
        setattr(self, name, made)
        return made


def _absent_class(module: str, name: str) -> type:
    def refuse(self: object, *_: object, **__: object) -> None:
        raise RuntimeError(f"{module}.{name} was asked for, Transformer Engine is not installed")

    return type(name, (), {"__init__": refuse, "__module__": module})


def install() -> bool:
    """Put the names in place unless Transformer Engine is installed.

    Returns:
        whether they were.
    """
    if importlib.util.find_spec(_NAME) is not None:
        return False
    import megatron.core.extensions.transformer_engine as extension

    assert not extension.HAVE_TE
    top = _Absent(_NAME)
    top.__version__ = "0.0"
    assert top.pytorch is sys.modules[f"{_NAME}.pytorch"]  # `import transformer_engine.pytorch` looks there
    return True
