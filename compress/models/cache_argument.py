"""How a model of transformers is given its cache, and gives it back.

The argument was ``past_key_values``. transformers 5.24 calls it ``cache``, in outputs too, and
takes the old name with a warning. Code that is not transformers' own may go on with the old name,
so it is the model that decides, not the version.
"""

import inspect
from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values")


def cache_argument(model: Any) -> str:
    """The name under which ``model`` takes a cache."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in parameters), "past_key_values")


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among the keywords of a call, or in a model's output; None where there is none."""
    # by what is there: asked for the old name, outputs of transformers 5.24 say that it is old
    return next((value for name, value in given.items() if name in NAMES), None)
