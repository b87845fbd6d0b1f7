"""Methods on a model in memory: what weight methods leave, and run-time methods until removed."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import HfApi

from compress.checkpoints.runtime import save_runtime
from compress.checkpoints.slim import save_slim
from compress.methods.base import Handle, RuntimeMethod

HOLDER = "_compress_applied"  # attribute of a model with methods on it


class _Saved:
    """Saving under the names that users of diffusers and transformers know."""

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a checkpoint folder; complete or untouched.

        Parameters
        ----------
        folder : new or empty, or with ``overwrite`` a checkpoint of compress.
        overwrite : replace a checkpoint of compress that is there.

        Raises
        ------
        FileExistsError : when the folder holds something that is not to be replaced.
        OSError : when the disk is full or the folder cannot be written.
        """
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """:meth:`save`, as diffusers and transformers call it."""
        return self.save(folder, overwrite=overwrite)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the checkpoint to the hub, and create the repository unless it exists.

        Parameters
        ----------
        repo_id : ``user/name``.
        private : of a new repository; the account's default when None.
        token : of the hub; the stored one when None.

        Returns
        -------
        Address of the commit.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save(Path(temporary) / "checkpoint")
            repository = api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository.repo_id, folder_path=folder))


@dataclass(frozen=True)
class Compressed(_Saved):
    """What a weight method leaves: a pipeline and the facts of how it came to be."""

    model: Any
    report: dict[str, Any]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a checkpoint folder that plain diffusers loads; see ``_Saved.save``."""
        return save_slim(self.model, Path(folder), self.report, overwrite=overwrite)


class Applied(_Saved):
    """A model with run-time methods on it, from construction until :meth:`remove`.

    As a context manager it removes them when the block is left; without, they stay.

    Parameters
    ----------
    model : of a family that every method serves.
    methods : the first one is applied first.
    processor : of the model; :meth:`save` stores it.

    Attributes
    ----------
    handles : what each method counts, by its name.

    Raises
    ------
    ValueError : when a method cannot be applied, then none is; or when others are applied already.
    """

    def __init__(self, model: Any, methods: Sequence[RuntimeMethod], processor: Any = None) -> None:
        if not methods:
            raise ValueError("at least one method is expected; got none; give a method")
        if hasattr(model, HOLDER):
            present = ", ".join(method.name for method in getattr(model, HOLDER).methods)
            raise ValueError(
                f"this model has {present} on it already; call remove() on what applied them, and "
                "give all methods together"
            )
        names = [method.name for method in methods]
        if len(set(names)) < len(names):
            raise ValueError(
                f"each method can be applied once; got {', '.join(names)}; leave one of them out"
            )
        self.model = model
        self.processor = processor
        self.methods = tuple(methods)
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.handles: dict[str, Handle] = {
                method.name: stack.enter_context(method.attach(model)) for method in methods
            }
            self._stack = stack.pop_all()
        # contexts that nothing holds are left: the model holds what lasts as long as it does
        setattr(model, HOLDER, self)

    def facts(self) -> dict[str, dict[str, Any]]:
        """What each method counted since the start or the last reset, by its name."""
        return {name: handle.facts() for name, handle in self.handles.items()}

    def reset(self) -> None:
        """Let every method count from zero."""
        for handle in self.handles.values():
            handle.reset()

    def remove(self) -> None:
        """Restore the model; a second call does nothing."""
        self._stack.close()
        if vars(self.model).get(HOLDER) is self:
            delattr(self.model, HOLDER)

    def save(self, folder: str | Path, processor: Any = None, *, overwrite: bool = False) -> Path:
        """Write a checkpoint that :func:`compress.load` gives back with the methods applied.

        Plain transformers loads it as the dense model. See ``_Saved.save``; ``processor`` is stored
        beside the model, the one of the constructor when None.

        Raises
        ------
        ValueError : when no processor was given.
        """
        processor = processor or self.processor
        if processor is None:
            raise ValueError(
                "a checkpoint holds the model's processor; none was given; pass processor= to "
                "apply or to save"
            )
        return save_runtime(self.model, processor, self.methods, Path(folder), overwrite=overwrite)

    def __repr__(self) -> str:
        """Name the model, the methods and whether they are still on it."""
        on = "" if vars(self.model).get(HOLDER) is self else ", removed"
        methods = ", ".join(map(repr, self.methods))
        return f"Applied({type(self.model).__name__}, [{methods}]{on})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise ValueError(
            "a model with run-time methods on it cannot be copied; remove them first, or save it "
            "and load it again"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
