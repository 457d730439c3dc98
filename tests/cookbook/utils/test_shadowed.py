"""An unrelated package named `renderers` is refused with its place and the command that helps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


def import_cookbook(path: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import cookbook"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Returns a folder with a package `renderers` of another project."""
    (tmp_path / "other" / "renderers").mkdir(parents=True)
    (tmp_path / "other" / "renderers" / "__init__.py").write_text("class Renderer: ...\n", encoding="utf-8")
    return tmp_path / "other"


def test_a_package_that_hides_ours_is_refused(other: Path, tmp_path: Path) -> None:
    ended = import_cookbook(f"{other}{os.pathsep}{REPOSITORY}", tmp_path)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: `import renderers` finds {other / 'renderers' / '__init__.py'}")
    assert last.endswith("take its folder off PYTHONPATH and start from another folder.")


def test_a_package_behind_ours_is_no_error(other: Path, tmp_path: Path) -> None:
    ended = import_cookbook(f"{REPOSITORY}{os.pathsep}{other}", tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_a_package_written_over_ours_is_refused(other: Path, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    for name in ("errors.py", "__init__.py", "utils"):
        source = REPOSITORY / "cookbook" / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        site.joinpath("cookbook").mkdir(parents=True, exist_ok=True)
        copy(source, site / "cookbook" / name)
    shutil.copytree(REPOSITORY / "renderers", site / "renderers", ignore=shutil.ignore_patterns("*.pyc"))
    assert import_cookbook(str(site), tmp_path).returncode == 0
    shutil.copyfile(other / "renderers" / "__init__.py", site / "renderers" / "__init__.py")
    stderr = import_cookbook(str(site), tmp_path).stderr
    assert "is not the package of sft-cookbook" in stderr
    assert "pip uninstall renderers" in stderr


@pytest.mark.parametrize("command", ["recipes", "recipes.sft"])
def test_commands_print_the_sentence_without_a_traceback(command: str, other: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{other}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert ended.returncode == 1
    assert not ended.stdout
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"`import renderers` finds {other / 'renderers' / '__init__.py'}")
    assert line.endswith("Rename it, or take its folder off PYTHONPATH and start from another folder.")
