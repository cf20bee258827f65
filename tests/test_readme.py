"""The code in the documentation runs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def python_blocks(page):
    """The page's blocks as one program: they share their names, in the order of the page."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    return namespace


def test_readme():
    found = python_blocks("README.md")
    assert found["result"].status == 0
    assert found["result"].history.outer_value[-1] < found["h"].info.outer_value


@pytest.mark.parametrize("page", ["docs/guide.md"])
def test_pages(page):
    python_blocks(page)
