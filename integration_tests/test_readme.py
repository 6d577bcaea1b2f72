"""What README says of tests is true as far as that can be looked up: they exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", README)))


def test_features_are_backed_by_tests():
    """Every row of the table, but for what others do."""
    table = README.split("## Beside vLLM's own backends")[1].split("##")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 10
    assert [ours for ours in rows if "`test_" not in ours] == []


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_named_tests_exist(file, test):
    (path,) = [*ROOT.glob(f"*/{file}"), *ROOT.glob(f"*/tests/{file}")]
    assert not test or f"def {test}(" in path.read_text()


@pytest.mark.parametrize("page", ["README.md", "kernels/README.md", "kernels/benchmarks/README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    here = [link for link in links if not link.startswith("http")]
    assert [link for link in here if not (ROOT / page).parent.joinpath(link).exists()] == []
