"""Command line options that are made from settings, so that each knob is declared once."""

import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from compress.common.foreign import foreign
from compress.common.settings import Settings

S = TypeVar("S", bound=Settings)
SIMPLE = (bool, int, float, str)


def options_of(
    *kinds: type[Settings],
    exclude: Collection[str] = (),
    renamed: Mapping[type[Settings], str] = types.MappingProxyType({}),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a typer command an option for each field of some settings.

    The command takes them as ``options``, a dict of those that were given; `validated` makes the
    settings of them. An option of several kinds is declared by the first one, and its help names
    what it sets in each.

    Parameters
    ----------
    kinds : the settings.
    exclude : fields without an option.
    renamed : for some kinds how their options are called, such as "{}_column".
    """
    fields: dict[str, list[FieldInfo]] = {}
    for kind in kinds:
        for name, field in kind.model_fields.items():
            if name not in exclude:
                fields.setdefault(renamed.get(kind, "{}").format(name), []).append(field)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "options"]
        made = [_parameter(name, info) for name, info in fields.items()]

        @functools.wraps(command)
        def _wrapped(**values: Any) -> None:
            options = {name: values.pop(name) for name in fields}
            chosen = {
                name: _loaded(name, value) if _as_yaml(fields[name][0]) else value
                for name, value in options.items()
                if value is not None
            }
            command(**values, options=chosen)

        parameters = sorted([*own, *made], key=lambda p: p.default is not p.empty)
        _wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
        )
        _wrapped.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return _wrapped

    return decorate


def _loaded(name: str, value: str) -> Any:
    with foreign("--" + name.replace("_", "-"), "a value as in a recipe", "correct it"):
        return yaml.safe_load(value)


def taken(options: dict[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """Take the options of one kind of settings out of all that were given."""
    return {name: options.pop(name) for name in kind.model_fields if name in options}


def validated(kind: type[S], options: Mapping[str, Any], subject: str = "") -> S:
    """Make settings of options.

    Parameters
    ----------
    kind : of the settings.
    options : by field.
    subject : what the settings are for, in a message about an option that they lack.

    Raises
    ------
    ValueError : listing each option that does not fit, as the command line calls it.
    """
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False):
            option = "--" + ".".join(map(str, problem["loc"])).replace("_", "-")
            if problem["type"] == "extra_forbidden":
                problems.append(f"{option} is not for {subject or kind.__name__}; leave it out")
            else:
                message = problem["msg"].removeprefix("Value error, ")
                problems.append(f"{option}: {message}; got {problem['input']!r}")
        raise ValueError("; ".join(problems)) from error


def _parameter(name: str, fields: list[FieldInfo]) -> inspect.Parameter:
    descriptions = dict.fromkeys(
        " ".join((field.description or "").split()).replace("``", "") for field in fields
    )
    defaults = dict.fromkeys(repr(field.default) for field in fields if field.default is not None)
    text = " Or: ".join(descriptions)
    if defaults:
        text += f" Default: {', '.join(defaults)}."
    option = typer.Option(help=text, show_default=False)
    annotation = str if _as_yaml(fields[0]) else _plain(fields[0].annotation)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation | None, option],
    )


def _plain(annotation: Any) -> Any:
    """A field's type without its constraints, null and numbers that also have a name."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [_plain(part) for part in get_args(annotation) if part is not types.NoneType]
        return kinds[0] if len(kinds) == 1 else None
    if annotation in SIMPLE or get_origin(annotation) is Literal:
        return annotation
    return None


def _as_yaml(field: FieldInfo) -> bool:
    """Whether an option is read as YAML: its field takes several types, or null for its default."""
    nullable = types.NoneType in get_args(field.annotation) and field.default is not None
    return nullable or _plain(field.annotation) is None
