"""The one exception that stands for a user's mistake."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake the user can mend; the message names the option, its value and the way out."""


@contextmanager
def blamed_on(option: str, *refusals: type[Exception]) -> Iterator[None]:
    """Turns a constructor's refusal of a value into a mistake in the option ``option``.

    ``refusals`` are the exceptions that mean it beside ValueError and TypeError.
    """
    try:
        yield
    except (TypeError, ValueError, *refusals) as error:
        raise UserError(f"{option}: {error}") from error
