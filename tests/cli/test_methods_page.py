"""docs/methods.md is what the command makes of the methods and settings as they are."""

from __future__ import annotations

from pathlib import Path

from onestep.cli.methods import page


def test_the_page_is_as_the_command_makes_it(root: Path) -> None:
    found = (root / "docs" / "methods.md").read_text("utf-8")
    assert found == page() + "\n", "make it anew: onestep methods --markdown > docs/methods.md"


def test_every_page_that_the_readme_names_is_there(root: Path) -> None:
    """And README is one screen of what it is and how to start."""
    readme = (root / "README.md").read_text("utf-8")
    named = {part.split(")")[0] for part in readme.split("](docs/")[1:]}
    assert named and all((root / "docs" / name).is_file() for name in named)
    assert readme.count("\n") <= 150
