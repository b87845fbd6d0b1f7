"""Settings: the one way in which knobs are declared, for recipes, Python and the command line."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

Fraction = Annotated[float, Field(gt=0, le=1)]
# far beyond any use; a plan of so many steps is still made in seconds
MOST = 10_000_000
Count = Annotated[int, Field(ge=1, le=MOST)]
# rendered pages are held while they are read
Pages = Annotated[int, Field(ge=1, le=100_000)]
NonNegative = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0)]

# marks the name of something that is read: a model, data, weights
READS: JsonDict = {"reads": True}


class Settings(BaseModel):
    """A frozen group of knobs; an unknown one is an error.

    The string below a field is its description: it documents the field, and is the help text of
    the command line option that sets it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def inputs_of(settings: Settings, above: str = "") -> dict[str, str]:
    """What settings name that is read, by dotted key."""
    inputs: dict[str, str] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            inputs |= inputs_of(value, f"{above}{name}.")
        elif isinstance(value, str) and field.json_schema_extra == READS:
            inputs[f"{above}{name}"] = value
    return inputs
