"""docs/models.md has every family and every column, and its cells are what trying a family gives."""

from __future__ import annotations

import re

import pytest
from families import FAMILIES
from family_checks import COLUMNS
from family_table import REFUSED, WITHOUT_ROW
from models_page import (
    FAILED,
    NOT_REACHED,
    PAGE,
    page_of,
    passes,
    refusal_of,
    refusals_of_page,
    row_of,
    rows_of_page,
)
from transformers.models.auto import modeling_auto as auto

ROWS = rows_of_page()
TIME = re.compile(r"\d+\.\d\d( of the time)?")


def test_the_page_has_every_family_in_order() -> None:
    assert list(ROWS) == list(FAMILIES)
    assert list(refusals_of_page()) == list(REFUSED)
    assert PAGE.read_text(encoding="utf-8") == page_of(ROWS, refusals_of_page())


def test_every_type_of_model_that_writes_text_has_a_row_or_a_reason() -> None:
    """The truth are the classes that transformers lists for its own pipelines."""
    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )
    types = {model_type for mapping in mappings for model_type in mapping}
    tried = [*FAMILIES.values(), *REFUSED.values()]
    with_row = {family.model_type for family in tried} | {
        str((family.text or {}).get("model_type", "")) for family in tried
    }
    without = " ".join(WITHOUT_ROW.values()).split()
    assert len(without) == len({*without})
    assert {*without} == types - with_row


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_family_has_the_reason_of_the_page(name: str) -> None:
    """Each is a ModelError, not an error of the model's own code."""
    assert refusal_of(name) == refusals_of_page()[name]


def test_every_cell_is_a_result_or_a_failure_with_a_reason() -> None:
    for name, row in ROWS.items():
        for column, cell in row.items():
            assert cell, f"{name}, {column}"
            assert cell != FAILED.strip(), f"{name}, {column}: no reason is given"
            # A column is not reached only where the first one says why.
            assert cell != NOT_REACHED or row["class"].startswith(FAILED), f"{name}, {column}"


def test_most_families_pass_every_column() -> None:
    assert sum(map(passes, ROWS.values())) >= 120


def assert_is_as_the_page_says(name: str) -> None:
    """Compares what fails. Times depend on the load of the machine, so a ratio may come out otherwise."""
    found = row_of(name)
    for column in COLUMNS:
        if column == "packed" and TIME.search(found[column]) and TIME.search(ROWS[name][column]):
            continue
        is_passed, should_pass = (
            not row[column].startswith((FAILED, NOT_REACHED)) for row in (found, ROWS[name])
        )
        assert is_passed == should_pass, f"{column}: {found[column]}, and the page says {ROWS[name][column]}"


@pytest.mark.slow
def test_a_representative_family_is_as_the_page_says() -> None:
    assert passes(ROWS["qwen3"])
    assert_is_as_the_page_says("qwen3")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_as_the_page_says(name: str) -> None:
    assert_is_as_the_page_says(name)
