"""The wheel works where nothing of the repository is at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.doctor import check_packages

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the unpacked wheel and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (folder / "dist").iterdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    target = ["--disable-pip-version-check", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([*install, *target], check=True, capture_output=True)
    return folder / "site"


def hsa_bench(site, cwd, *arguments, before=()):
    """Run the installed script; `before` are folders that come earlier on the path."""
    path = os.pathsep.join(map(str, [*before, site]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(site / "bin" / "hsa-bench"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_installed_command_plans_the_demo(installed, tmp_path):
    plan = hsa_bench(installed, tmp_path, "plan", "experiment=demo")
    assert plan.returncode == 0, plan.stderr
    assert "FM T=40" in plan.stdout and "0 cached" in plan.stdout
    assert not list(tmp_path.iterdir())


def test_the_installed_code_is_the_one_that_runs(installed, tmp_path):
    doctor = hsa_bench(installed, tmp_path, "doctor")
    assert "no git checkout" in doctor.stdout, doctor.stderr


def test_a_foreign_package_of_our_name_is_refused(installed, tmp_path):
    """`pip install conf` overwrites ours; a folder of that name can shadow it."""
    shadow = tmp_path / "shadow"
    (shadow / "conf").mkdir(parents=True)
    (shadow / "conf" / "__init__.py").touch()
    plan = hsa_bench(installed, tmp_path, "plan", before=[shadow])
    assert plan.returncode == 2
    assert "package 'conf'" in plan.stderr and plan.stderr.count("\n") == 1


def test_packages_of_this_checkout_are_ours():
    check_packages()


def test_everything_that_is_not_code_travels(installed):
    tracked = ["conf/*.yaml", "conf/*/*.yaml", "analysis/templates/*", "experiments/**/weights/**"]
    needed = {
        path.relative_to(ROOT)
        for pattern in tracked
        for path in ROOT.glob(pattern)
        if path.is_file()
    }
    assert len(needed) > 20
    assert [path for path in sorted(needed) if not (installed / path).is_file()] == []
