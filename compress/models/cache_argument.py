"""Under which name a model of transformers takes and returns its cache.

The argument was ``past_key_values``. transformers 5.24 calls it ``cache``, in outputs too, and
takes the old name with a warning. Models from elsewhere may keep the old name, so the model
decides, not the version.
"""

import inspect
from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values")


def cache_argument(model: Any) -> str:
    """The name under which ``model`` takes a cache."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in parameters), "past_key_values")


def cache_in(values: Mapping[str, Any]) -> Any:
    """The cache among the keywords of a call, or in a model's output; None where there is none."""
    # iterated, since outputs of transformers 5.24 warn where the old name is looked up
    return next((value for name, value in values.items() if name in NAMES), None)
