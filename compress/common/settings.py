"""Settings: the one way in which knobs are declared, for recipes, Python and the command line."""

import difflib
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

Fraction = Annotated[float, Field(gt=0, le=1)]
# far beyond any use; a plan of so many steps is still made in seconds
MOST = 10_000_000
Count = Annotated[int, Field(ge=1, le=MOST)]
# rendered pages, whose texts are held
Pages = Annotated[int, Field(ge=1, le=100_000)]
# what is held in memory at once, or started
MOST_TOGETHER, MOST_PROCESSES = 65_536, 1_024
Batch = Annotated[int, Field(ge=1, le=MOST_TOGETHER)]
Tokens = Annotated[int, Field(ge=1, le=131_072)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
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

    if not TYPE_CHECKING:  # who checks types reads the fields

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                problems = explained(error, type(self).model_fields)
                raise ValueError(f"{type(self).__name__}: {problems}; correct it") from None

        # recipes and checkpoints, which report errors in their own way, are validated without it
        __init__.__pydantic_base_init__ = True


def explained(error: ValidationError, known: Collection[str]) -> str:
    """What pydantic says of settings, in one line.

    Parameters
    ----------
    error : of the settings.
    known : the names that there are.
    """
    wrong = []
    for problem in error.errors(include_url=False):
        name = str(next(iter(problem["loc"]), ""))
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            wrong.append(f"{name} is none of {', '.join(known)}{did_you_mean(name, known)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = f"; got {problem['input']!r:.60}" if name else ""
            wrong.append(f"{name + ': ' if name else ''}{message}{got}")
    return "; ".join(wrong)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The nearest known name as the end of a message, if one is near."""
    nearest = [] if name in known else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


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
