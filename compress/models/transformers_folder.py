"""Load a transformers model folder, with errors that name what is wrong with it."""

from pathlib import Path
from typing import Any

import torch

from compress.common.foreign import foreign
from compress.models.weights import check_weights, silent_transformers


def read_model(model_class: Any, folder: Path, dtype: torch.dtype, config: Any = None) -> Any:
    """Load a folder into a transformers class, for evaluation; no code of the folder runs.

    Parameters
    ----------
    model_class : has ``from_pretrained``; no automatic class, which would choose by the folder.
    folder : whose weights are compared with the configuration first.
    dtype : of the parameters.
    config : in place of the folder's own.
    """
    check_weights(folder, model_class, config)
    arguments = {} if config is None else {"config": config}
    with foreign(folder, f"a {model_class.__name__}"), silent_transformers():
        model = model_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **arguments,
        )
    return model.eval()
