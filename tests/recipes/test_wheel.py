"""The wheel, installed in an environment of its own, trains outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    # neither the checkout nor the editable install may be found by accident
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_installed_trains_outside_checkout(tmp_path: Path) -> None:
    # setuptools would pack whatever an earlier build left there
    shutil.rmtree(CHECKOUT / "build/lib", ignore_errors=True)
    # the source archive, and the wheel from what is in the archive
    build = ["build", "--no-isolation", "--outdir", tmp_path, CHECKOUT]
    run(sys.executable, "-m", *build, cwd=tmp_path)
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive, cwd=tmp_path)

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
    bare = subprocess.run([environment / "bin/stableaa-train"], capture_output=True, text=True)
    assert bare.returncode == 2
    assert "pip install 'lightning-stableaa[recipes]' brings it" in bare.stderr
    # torch and the like are borrowed; as a path and not a site directory, so that the editable
    # install of this package beside them stays out of sight
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-c", show, cwd=tmp_path).strip())
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    location = run(
        python, "-c", "import lightning_stableaa.recipes as it; print(it.__file__)", cwd=tmp_path
    )
    assert location.startswith(str(site_packages))

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ["recipe=burgers2d", "trainer.max_steps=20", "trainer.val_check_interval=20"]
    run(environment / "bin" / "stableaa-train", *options, cwd=elsewhere)
    (folder,) = (elsewhere / "runs/burgers2d").iterdir()
    names = {"checkpoints", "config.yaml", "metrics.csv", "pictures", "results.json", "tensorboard"}
    assert {path.name for path in folder.iterdir()} == names
    assert (site_packages / "lightning_stableaa/py.typed").is_file()
