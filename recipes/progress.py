"""The progress bar of a run."""

from importlib.util import find_spec

from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar


def progress_bar() -> ProgressBar:
    """Rich's bar where Rich is installed, else Lightning's usual one."""
    return _RichBar() if find_spec("rich") else TQDMProgressBar()


class _RichBar(RichProgressBar):
    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        # runs limited in steps have max_epochs -1, which the bar would show as "Epoch 0/-2"
        return description.replace("/-2", "")
