"""The progress bar of a run."""

from importlib.util import find_spec

from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar


def progress_bar() -> ProgressBar:
    """Rich's bar where Rich is installed, else Lightning's usual one."""
    return RichProgressBar(leave=False) if find_spec("rich") else TQDMProgressBar()
