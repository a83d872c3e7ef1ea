"""A ``metrics.csv`` that a resumed run continues."""

import csv
import io
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lightning_stableaa.recipes.files import write_atomically


class AppendCSVLogger(CSVLogger):
    """Lightning's logger, which would delete what an interrupted run had logged to the folder.

    Rows from the step on at which the run is resumed are replaced by those that it logs.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of this run's file."""
        if not isinstance(self._experiment, _AppendingWriter):
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment


class _AppendingWriter(ExperimentWriter):
    continued = False

    def _check_log_dir_exists(self) -> None:
        pass  # deletes the file

    def save(self) -> None:
        if self.metrics and not self.continued:
            self.continued = True
            self.metrics_keys = _truncate(
                Path(self.metrics_file_path), min(row["step"] for row in self.metrics)
            )
        super().save()


def _truncate(path: Path, step: float) -> list[str]:
    """Drops the rows from ``step`` on; returns the names of the columns."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if int(row["step"]) < step]
        names = list(reader.fieldnames or [])
    kept = io.StringIO(newline="")
    writer = csv.DictWriter(kept, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, kept.getvalue())
    return names
