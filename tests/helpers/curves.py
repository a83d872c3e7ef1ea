"""Curves of runs, made by hand."""

from collections.abc import Sequence

from lightning_stableaa.recipes.comparison.cost import Curve


def curve(values: Sequence[float], *, losses: int = 0, tried: int = 0, accepted: int = 0) -> Curve:
    """A validation every ten gradients and every second.

    Between two validations there are ``losses`` loss evaluations, ``tried`` attempts, and as many
    acceptances as ``accepted``.
    """
    counts = range(1, len(values) + 1)
    return Curve(
        gradients=[10 * i for i in counts],
        loss_evaluations=[losses * i for i in counts],
        seconds=[float(i) for i in counts],
        processor_seconds=[i / 2 for i in counts],
        values=list(values),
        attempted=[tried * i for i in counts],
        accepted=[accepted * i for i in counts],
    )
