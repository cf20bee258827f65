"""The README's code runs."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert blocks
    for block in blocks:
        namespace = {}
        exec(compile(block, "README.md", "exec"), namespace)
        assert namespace["result"].status == 0
        assert namespace["result"].history.outer_value[-1] < namespace["h"].info.outer_value
