"""What scripts/train.py is made of: settings, data, model, order of examples, loss, checkpoints, progress and the final folder."""

from .errors import BadInput
from .settings import Settings, parse_settings

__all__ = ["BadInput", "Settings", "parse_settings"]
