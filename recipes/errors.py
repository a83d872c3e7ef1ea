"""The one exception that means a wrong configuration."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A wrong configuration; the message names the option, its value and the way out."""


def check_type(built: object, kind: str, option: str) -> None:
    """Raises UserError where ``option`` has built no ``kind``, the name of a class.

    By name, since ``lightning`` and ``pytorch_lightning`` have two classes of most names.
    """
    if kind not in {one.__name__ for one in type(built).__mro__}:
        raise UserError(
            f"{option}._target_: expected {kind} or a class derived from it, "
            f"got one that builds {type(built).__name__}"
        )


@contextmanager
def attribute_to(option: str, *refusals: type[Exception]) -> Iterator[None]:
    """Turns a constructor's refusal of a value into a UserError about ``option``.

    ``refusals`` are the exceptions that mean it beside ValueError and TypeError.
    """
    try:
        yield
    except (TypeError, ValueError, *refusals) as error:
        raise UserError(f"{option}: {error}") from error
