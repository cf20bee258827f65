"""What the commands raise for input they cannot work with."""

import importlib.util


class InputError(ValueError):
    """Bad input to a command: the message says in one line what was found and what was expected."""

    def __init__(self, message: str) -> None:
        # File contents and parser messages may hold line breaks and control characters.
        text = "".join(c if c.isprintable() else " " for c in message)
        text = " ".join(text.split())
        super().__init__(text if len(text) <= 400 else text[:397] + "...")


def brief(error: Exception) -> str:
    """The beginning of what a parser says; some quote the whole file."""
    return f"{error}"[:150]


def require_tune_extra() -> None:
    """scikit-learn, pandas and what they need are optional: say which extra brings them."""
    for module in ("sklearn", "pandas", "pyarrow", "jinja2"):
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"cannot import {module}; expected the optional dependencies of the commands: "
                "pip install 'bilevel[tune]'"
            )
