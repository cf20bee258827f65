"""The report of a run: one page that needs nothing beside itself."""

import functools
import importlib.resources
from typing import Any

import numpy as np

from bilevel.tuning.report.sections import make_sections
from bilevel.tuning.results import Saved


def render(saved: Saved, X: np.ndarray | None = None) -> str:
    """The page in HTML. `X`, where known, are the features of all rows of the data, (n, d).

    A section appears only where the result has what it shows.
    """
    return _template().render(style=_read("style.css"), **make_sections(saved, X))


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,  # names of columns and classes come from users' files
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html")


def _read(name: str) -> str:
    return importlib.resources.files(__name__).joinpath(name).read_text("utf-8")
