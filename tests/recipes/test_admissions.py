"""Reading, splitting and standardising the admissions table; training on it."""

import os
from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor

from lightning_stableaa.recipes.admissions_mlp import AdmissionsData
from lightning_stableaa.recipes.admissions_mlp.data import read_table
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.train import train
from tests.recipes.conftest import HEADER, Compose

REAL_CSV = os.environ.get("STABLEAA_ADMISSIONS_CSV", "")
needs_real_csv = pytest.mark.skipif(
    not REAL_CSV, reason="STABLEAA_ADMISSIONS_CSV does not name the Graduate Admissions file"
)


def test_table_rows_keep_file_order(admissions_csv: Path) -> None:
    features, targets = read_table(admissions_csv)
    assert features.shape == (50, 7)
    # the generated target is the sum of the features / 50, as written with full precision
    torch.testing.assert_close(targets, features.sum(1, keepdim=True) / 50)


@needs_real_csv
def test_table_real_file_has_500_rows() -> None:
    features, targets = read_table(Path(REAL_CSV))
    assert (features.shape, targets.shape) == ((500, 7), (500, 1))
    assert features[0].tolist() == pytest.approx([337, 118, 4, 4.5, 4.5, 9.65, 1])
    assert targets[0].item() == pytest.approx(0.92)


ROW = "1,337,118,4,4.5,4.5,9.65,1,0.92"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            f"{HEADER.rpartition(',')[0]}\n{ROW}",
            "comma: no column 'Chance of Admit' among 'Serial No.', 'GRE Score', .*, 'Research';",
        ),
        ("a|b\n1|2", r"comma: no column 'GRE Score', .* among 'a\|b';"),
        (
            f"{HEADER}\n{ROW}\n{ROW.replace('9.65', 'high')}",
            r"row 2 \(line 3\), column 'CGPA': expected a finite number, got 'high';",
        ),
        (
            f"{HEADER}\n{ROW.replace('9.65', 'nan')}",
            r"row 1 \(line 2\), column 'CGPA': expected a finite number, got 'nan';",
        ),
        (
            f"{HEADER}\n1,337,118",
            r"row 1 \(line 2\), column 'University Rating': expected a finite number, got '';",
        ),
        (
            f"{HEADER}\n{ROW.replace('4.5', '4,5')}",
            r"row 1 \(line 2\) has 11 values for 9 columns;",
        ),
        (
            f"{HEADER}\n{ROW}".replace(",", ";").replace("4.5", "4,5"),
            r"semicolon: row 1 \(line 2\), column 'SOP': expected a finite number, got '4,5';",
        ),
        (HEADER, "no rows below the header;"),
        ("", "the file is empty;"),
    ],
)
def test_table_invalid_file_names_row_column_and_value(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^data\.csv={path}, read with the .*{message}"):
        read_table(path)


def test_table_other_encoding_raises(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(HEADER.encode("utf-16"))
    with pytest.raises(UserError, match=rf"^data\.csv={path} is not a text file in UTF-8;"):
        read_table(path)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_table_other_delimiter_is_read_alike(
    delimiter: str, admissions_csv: Path, tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    path.write_text(admissions_csv.read_text().replace(",", delimiter))
    assert all(map(torch.equal, read_table(path), read_table(admissions_csv)))


def test_table_missing_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_stableaa.recipes.admissions_mlp.data.find_spec", lambda name: None
    )
    with pytest.raises(UserError, match=r"Kaggle dataset mohansacharya/.* pass data\.csv=PATH"):
        AdmissionsData().prepare_data()


def test_split_seeded_scales_by_training_rows(admissions_csv: Path) -> None:
    def parts(seed: int) -> AdmissionsData:
        data = AdmissionsData(csv=str(admissions_csv), seed=seed)
        data.setup("fit")
        return data

    data = parts(seed=0)
    features, targets = data.training.tensors
    assert (len(data.training), len(data.validation)) == (40, 10)
    torch.testing.assert_close(features.mean(0), torch.zeros(7), atol=1e-6, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(7))
    every_target = torch.cat([targets, data.validation.tensors[1]]).sort(dim=0).values
    assert torch.equal(every_target, read_table(admissions_csv)[1].sort(dim=0).values)
    assert torch.equal(parts(seed=0).training.tensors[1], targets)
    assert not torch.equal(parts(seed=1).training.tensors[1], targets)


def test_batches_order_depends_on_seed_and_epoch(admissions_csv: Path) -> None:
    def batches(seed: int, epoch: int) -> list[Tensor]:
        data = AdmissionsData(csv=str(admissions_csv), batch_size=8, seed=seed)
        data.trainer = lightning.Trainer(logger=False, enable_checkpointing=False)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]
        return [targets.flatten() for _, targets in loader]

    first = batches(seed=0, epoch=0)
    assert [len(batch) for batch in first] == [8] * 5
    assert all(map(torch.equal, first, batches(seed=0, epoch=0)))
    for other in (batches(seed=0, epoch=1), batches(seed=1, epoch=0)):
        assert not torch.equal(torch.cat(first), torch.cat(other))
    every_row = torch.cat(first).sort().values
    assert torch.equal(every_row, torch.cat(batches(seed=0, epoch=1)).sort().values)


@needs_real_csv
def test_plain_training_real_file_reaches_reference_error(compose: Compose, tmp_path: Path) -> None:
    config = compose("recipe=admissions_mlp", "callbacks=none", "logger=none", "pictures=false")
    config.data.csv = REAL_CSV
    config.trainer.max_epochs = 30
    results = train(config)
    assert results["cost/gradients"] == 300
    # the median over five seeds was 0.0098 with another implementation of the same setting
    assert 0.004 < results["val/mse"] < 0.02
