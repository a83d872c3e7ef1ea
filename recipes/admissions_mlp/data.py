"""The Graduate Admissions table: reading, splitting, standardising."""

import csv
import math
from importlib.util import find_spec
from pathlib import Path

import lightning
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.loading import training_loader

FEATURES = ("GRE Score", "TOEFL Score", "University Rating", "SOP", "LOR", "CGPA", "Research")
TARGET = "Chance of Admit"
KAGGLE_DATASET = "mohansacharya/graduate-admissions"
FILE_NAME = "Admission_Predict_Ver1.1.csv"
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
SURPLUS = "values beyond the header"


class AdmissionsData(lightning.LightningDataModule):
    """Batches of standardised features (batch, 7) and chances of admission (batch, 1).

    Args:
        csv: path of the table; None downloads it with kagglehub.
        batch_size: rows in a training batch.
        validation_share: share of the rows kept for validation.
        seed: decides the split and the order of the batches.
    """

    def __init__(
        self,
        csv: str | None = None,
        batch_size: int = 40,
        validation_share: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share must lie in (0, 1), got {validation_share}")
        self.csv = csv
        self.batch_size = batch_size
        self.validation_share = validation_share
        self.seed = seed

    def prepare_data(self) -> None:
        """Downloads the table where no file is given, once per machine."""
        self._path()

    def setup(self, stage: str) -> None:
        """Reads and splits the table; nothing about the validation rows enters the scaling."""
        features, targets = read_table(self._path())
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(self.seed))
        held_out = round(len(features) * self.validation_share)
        validation, training = order[:held_out], order[held_out:]
        if not len(validation) or not len(training):
            raise UserError(
                f"data.validation_share={self.validation_share} leaves one part of the "
                f"{len(features)} rows empty; choose another share"
            )
        std, mean = torch.std_mean(features[training], dim=0)
        # a column that is constant on the training part is centred and left unscaled
        features = (features - mean) / torch.where(std > 0, std, torch.ones_like(std))
        self.training = TensorDataset(features[training], targets[training])
        self.validation = TensorDataset(features[validation], targets[validation])

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled batches of the training rows."""
        assert self.trainer is not None
        return training_loader(
            self.training, batch_size=self.batch_size, seed=self.seed, trainer=self.trainer
        )

    def val_dataloader(self) -> StatefulDataLoader:
        """All validation rows in one batch."""
        return StatefulDataLoader(self.validation, batch_size=len(self.validation))

    def _path(self) -> Path:
        if self.csv is not None:
            return Path(self.csv)
        if find_spec("kagglehub") is None:
            raise UserError(
                f"data.csv is not set and kagglehub is not installed: download {FILE_NAME} from "
                f"the Kaggle dataset {KAGGLE_DATASET} and pass data.csv=PATH, or pip install "
                f"kagglehub to have it downloaded"
            )
        import kagglehub  # pyright: ignore[reportMissingImports]  # optional

        return Path(kagglehub.dataset_download(KAGGLE_DATASET)) / FILE_NAME


def read_table(path: Path) -> tuple[Tensor, Tensor]:
    """Features (rows, 7) and targets (rows, 1) in float32, in the order of the file.

    The delimiter is the comma, the semicolon or the tab, whichever the header has most of.

    Raises:
        UserError: the file is missing, lacks a column, or holds something that is no number; the
            message names row, column and value.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"data.csv={path}: {error.strerror}; give the path of {FILE_NAME}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.csv={path} is not a text file in UTF-8; give the path of {FILE_NAME}"
        ) from error
    delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
    try:
        table = csv.DictReader(text.splitlines(), delimiter=delimiter, restkey=SURPLUS)
        return _parse_table(table)
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"data.csv={path}, read with the delimiter {DELIMITERS[delimiter]}: {error}; give the "
            f"path of {FILE_NAME}, or mend the table"
        ) from error


def _parse_table(table: "csv.DictReader[str]") -> tuple[Tensor, Tensor]:
    # the file as distributed has trailing blanks in its header: "LOR ", "Chance of Admit "
    columns = table.fieldnames = [name.strip() for name in table.fieldnames or ()]
    if not columns:
        raise ValueError("the file is empty")
    if missing := [name for name in (*FEATURES, TARGET) if name not in columns]:
        raise ValueError(
            f"no column {', '.join(map(repr, missing))} among {', '.join(map(repr, columns))}"
        )
    rows = []
    for number, row in enumerate(table, start=1):
        where = f"row {number} (line {table.line_num})"
        if any(surplus := row.get(SURPLUS, ())):  # a delimiter at the end of the line adds none
            count = len(columns) + len(surplus)
            raise ValueError(f"{where} has {count} values for {len(columns)} columns")
        rows.append(
            [_number(row[name], f"{where}, column {name!r}") for name in (*FEATURES, TARGET)]
        )
    if not rows:
        raise ValueError("no rows below the header")
    values = torch.tensor(rows)
    return values[:, :-1], values[:, -1:]


def _number(value: str | None, where: str) -> float:
    try:
        number = float(value or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: expected a finite number, got {value or ''!r}")
    return number
