"""What pipelines compile to, as it was last looked at."""

from __future__ import annotations

import pytest
import yaml
from renew_golden import CASES, GOLDEN, compiled


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_compiles_to_what_it_did(case: str) -> None:
    wanted = list(yaml.safe_load_all((GOLDEN / f"{case}.yaml").read_text()))
    renew = "if it should: `python tests/pipelines/renew_golden.py`, and commit what that changes"
    assert compiled(case) == wanted, f"{case} compiles to something else; {renew}"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == {*CASES, "images"}
