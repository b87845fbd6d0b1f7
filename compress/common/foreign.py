"""Files from outside: the errors of the libraries that read them, each as one line."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.common.extras import MissingExtraError

LONGEST_NAME, LONGEST_REASON, LONGEST = 100, 300, 2000


class ForeignFileError(ValueError):
    """A file from outside that cannot be used.

    Parameters
    ----------
    message : may quote the file as it is; it becomes one line.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str, longest: int = LONGEST) -> str:
    r"""What does not print is escaped; the middle of what is too long to be read is left out.

    >>> print(one_line("a\nb"), one_line("abcdefgh", 4))
    a\nb ab...gh
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


@contextlib.contextmanager
def foreign(path: str | Path, what: str, remedy: str = "restore the file") -> Iterator[None]:
    """Let a library read a file within the context; any error of it names the file.

    Parameters
    ----------
    path : of the file, or of the folder where a library reads several.
    what : it should hold, for the message.
    remedy : what to do.

    Raises
    ------
    ForeignFileError : for whatever the library raises.
    MissingExtraError, OSError : as they come: a missing package, and what the system says (no
        permission, no such file, a full disk), are not the content's fault.
    """
    try:
        yield
    except (ForeignFileError, MissingExtraError):
        raise
    except Exception as error:  # libraries raise what they like, the tokenizers a bare Exception
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ForeignFileError(
            f"{path} should hold {what} but does not load: {reason(error)}; {remedy}"
        ) from error


def reason(error: BaseException) -> str:
    """What an error says, as a part of a line."""
    if isinstance(error, ValidationError):
        problems = error.errors(include_url=False)
        text = "; ".join(
            f"{'.'.join(map(str, p['loc']))}: {p['msg']}, got {p['input']!r:.60}" for p in problems
        )
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


@contextlib.contextmanager
def soon(seconds: float, what: str) -> Iterator[None]:
    """Stop Python code of a library that does not end by itself, such as a template with loops.

    What runs in C is not stopped.

    Parameters
    ----------
    seconds : that it may take.
    what : is run, for the message.

    Raises
    ------
    TimeoutError : within the code, once the time is over.
    """
    end = time.monotonic() + seconds

    def look(*_: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"{what} is not done after {seconds:g} seconds")
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)
