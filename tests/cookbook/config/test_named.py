"""Configs of this project are found by name from any folder, and their files with them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from cookbook.config import cli, config_files, named
from cookbook.errors import ConfigError
from cookbook.supervised import train
from cookbook.sweeps import make_plan
from recipes import sft

REPOSITORY = Path(__file__).parents[3]


def make(*argv: str) -> train.Config:
    return cli.make_config(train.Config, sft.DEFAULTS, argv)


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml")))
def test_every_config_is_found_by_its_name_and_by_its_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the model of the second rung is what another run leaves
    model = ["model_name=cookbook/tiny-chat"] if name == "ladder_tiny" else []
    monkeypatch.chdir(REPOSITORY)
    here = config_files.to_json(make(f"config=configs/{name}.yaml", *model))
    monkeypatch.chdir(tmp_path)
    by_name = config_files.to_json(make(f"config={name}", *model))
    assert by_name == config_files.to_json(make(f"config=configs/{name}.yaml", *model))
    differing = config_files.differences(here, by_name)
    for was, found in differing.values():  # files of this project, which are found from here as well
        assert was.startswith("configs/")
        assert Path(found).samefile(REPOSITORY / was)


def test_a_config_that_reads_a_file_beside_it_has_that_file_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (builder,) = make("config=pirate_tiny_evaluated").evaluator_builders[:1]
    assert Path(builder.path).is_file()


def test_a_file_of_the_user_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pirate_tiny").write_text(
        "batch_size: 3\ndataset: configs/data/facts.jsonl", encoding="utf-8"
    )
    config = make("config=pirate_tiny")
    assert config.dataset_builder.common_config.batch_size == 3
    assert config.dataset_builder.dataset == "configs/data/facts.jsonl", "only our configs name our files"


def test_a_sweep_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(make_plan(["sweep=pirate_tiny"]).runs) > 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("config=pirate_tny", "there is no such file. Did you mean `pirate_tiny`? Named configs: "),
        ("config=nothing/pirate_tiny", "config=nothing/pirate_tiny: there is no such file."),
        ("config=configs/nothing.yaml", "config=configs/nothing.yaml: there is no such file."),
        ("config=../configs/sweeps", "there is no such file."),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(argv)
    assert message in str(caught.value)


def test_the_wheel_carries_every_file_of_configs() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["cookbook"]
    carried = {path for pattern in patterns for path in (REPOSITORY / "cookbook").glob(pattern)}
    assert (REPOSITORY / "cookbook" / "py.typed") in carried
    files = {path for path in named.FOLDER.rglob("*") if path.is_file()}
    assert files <= carried
    assert len(files) > 15
