"""Foreword: prefix tuning. Freeze a pretrained Transformer, train a few key and value vectors, keep them as the task."""

from .attention import attach, attention_sites
from .errors import ForewordError
from .evaluate import evaluate
from .prefix import AttentionSite, Prefix, PrefixConfig
from .store import PrefixStore, load, save
from .train import TrainConfig, train

__all__ = [
    "AttentionSite",
    "ForewordError",
    "Prefix",
    "PrefixConfig",
    "PrefixStore",
    "TrainConfig",
    "attach",
    "attention_sites",
    "evaluate",
    "load",
    "save",
    "train",
]

__version__ = "0.1.0"
