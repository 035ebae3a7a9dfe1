"""Foreword: prefix tuning. Freeze a pretrained Transformer, train a few key and value vectors, keep them as the task."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .anatomy import attention_sites
    from .attachment import attach
    from .composition import compose
    from .config import PrefixConfig, TrainConfig
    from .errors import ForewordError
    from .evaluation import evaluate
    from .initialization import text_prefix
    from .models import load_base
    from .prefix import AttentionSite, Prefix
    from .store import PrefixStore, load, save
    from .training import Job, train, train_many

__all__ = [
    "AttentionSite",
    "ForewordError",
    "Job",
    "Prefix",
    "PrefixConfig",
    "PrefixStore",
    "TrainConfig",
    "attach",
    "attention_sites",
    "compose",
    "evaluate",
    "load",
    "load_base",
    "save",
    "text_prefix",
    "train",
    "train_many",
]

__version__ = "0.1.0"

# Torch and Transformers take seconds to import; the command's help and its errors need neither.
_HOME = {
    "AttentionSite": "prefix",
    "ForewordError": "errors",
    "Job": "training",
    "Prefix": "prefix",
    "PrefixConfig": "config",
    "PrefixStore": "store",
    "TrainConfig": "config",
    "attach": "attachment",
    "attention_sites": "anatomy",
    "compose": "composition",
    "evaluate": "evaluation",
    "load": "store",
    "load_base": "models",
    "save": "store",
    "text_prefix": "initialization",
    "train": "training",
    "train_many": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
