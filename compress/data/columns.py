"""Where a data source keeps what a model is told about each image."""

from pydantic import Field

from compress.common.settings import Settings


class Columns(Settings):
    """Columns of captions and labels, for models that take them."""

    caption: str = Field("text", min_length=1)
    """Column of a ``hub:`` data set, or key in the ``metadata.jsonl`` of a folder, that holds the
    captions."""
    label: str = Field("label", min_length=1)
    """Column of a ``hub:`` data set that holds the labels; the classes of a folder are its
    subfolders."""
