"""Tells transformers' Auto classes of every memzoo architecture as soon as transformers is there, without loading either early.

Configuration classes are registered through the public `AutoConfig.register`. Model classes are put behind a mapping that imports a
modelling file when a model of that kind is first asked for: transformers' own `register` takes the class itself, which would load them all.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"


class _LazyClasses(dict):
    """Configuration class to model class, where a value given as (module, name) is imported when it is looked up."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
            value = getattr(importlib.import_module(value[0]), value[1])
            self[key] = value
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (dict.get would not import)

    def values(self):
        return [self[key] for key in self]

    def items(self):
        return [(key, self[key]) for key in self]


def _register_configurations(auto: ModuleType) -> None:
    from .models.registry import ARCHITECTURES

    for architecture in ARCHITECTURES:
        if architecture.model_type not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register(architecture.model_type, architecture.load_config_class())


def _register_models(auto: ModuleType) -> None:
    from .models.registry import ARCHITECTURES

    for name, mapping in (("AutoModel", auto.MODEL_MAPPING), ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING)):
        if not isinstance(mapping._extra_content, _LazyClasses):
            mapping._extra_content = _LazyClasses(mapping._extra_content)
        for architecture in ARCHITECTURES:
            configuration = architecture.load_config_class()
            if configuration not in mapping:
                mapping.register(configuration, (architecture.modeling_module, architecture.classes[name]))


# What to do once a module of transformers has been imported, in the order in which transformers imports them.
_WHEN_IMPORTED = {CONFIGURATIONS: _register_configurations, MODELS: _register_models}


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers right after somebody else has imported one of transformers' Auto modules."""

    def __init__(self) -> None:
        self._loaders: dict[str, Any] = {}

    def find_spec(self, name, path=None, target=None):
        if name not in _WHEN_IMPORTED or name in self._loaders:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            self._loaders[name] = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec):
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module):
        loader = self._loaders[module.__name__]
        module.__spec__.loader = module.__loader__ = loader
        loader.exec_module(module)
        _WHEN_IMPORTED[module.__name__](module)


def install() -> None:
    """Register now what of transformers' Auto classes is loaded, and the rest when it is."""
    for name, action in _WHEN_IMPORTED.items():
        if name in sys.modules:
            action(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
