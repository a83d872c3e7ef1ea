"""The wheel, installed in an environment of its own, trains outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers.startup import sitecustomize
from tests.recipes.conftest import SMALL

CHECKOUT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    # neither the checkout nor the editable install may be found by accident
    environment = os.environ | {"PYTHONPATH": str(Path(sitecustomize.__file__).parent)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


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
    venv.create(environment)
    python, command = environment / "bin/python", environment / "bin/stableaa-train"
    install = ["pip", "--python", python, "install", "--no-deps", wheel]
    run(sys.executable, "-m", *install, cwd=tmp_path)
    bare = run(command, cwd=tmp_path, code=2)
    assert "pip install 'lightning-stableaa[recipes]' brings it" in bare.stderr
    # torch and the like are borrowed; as a path and not a site directory, so that the editable
    # install of this package beside them stays out of sight
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    show = "import lightning_stableaa.recipes as it; print(it.__file__)"
    assert run(python, "-c", show, cwd=tmp_path).stdout.startswith(str(site_packages))

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(command, *SMALL["burgers2d"], "trainer.max_steps=20", cwd=elsewhere)
    (folder,) = (elsewhere / "runs/burgers2d").iterdir()
    names = {"checkpoints", "config.yaml", "metrics.csv", "pictures", "results.json", "tensorboard"}
    assert {path.name for path in folder.iterdir()} == names
    assert (site_packages / "lightning_stableaa/py.typed").is_file()
