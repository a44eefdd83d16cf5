"""Prompts: one a line by newline alone, and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onestep.cli.model import read_prompts as read_in_the_command
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.pipelines.distill import _prompts as read_in_python
from onestep.training.engine.prompts import Prompts, check_prompts, lines, read_prompts

# all that str.splitlines ends a line at, and no editor does
INSIDE = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_prompt_ends_where_its_line_ends(inside: str, end: str, tmp_path: Path) -> None:
    wanted = [f"a lake{inside}at dusk", "two  boats"]
    path = tmp_path / "prompts.txt"
    path.write_bytes(("\ufeff" + end.join([wanted[0], "", f" {inside} ", wanted[1], ""])).encode())
    assert lines(path.read_text("utf-8-sig")) == wanted
    assert read_prompts(path) == read_in_python(path) == read_in_the_command(str(path)) == wanted


def test_mixed_ends_are_one_end_each() -> None:
    assert lines("a\r\nb\rc\nd\n\r\ne\r\r\nf") == list("abcdef")


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        (None, "prompts is None, not a list"),
        (7, "prompts is 7, not a list"),
        ("a cat", "prompts is 'a cat', not a list"),
        (b"a cat", "not a list"),
        ([], "0 prompts"),
        (["a", None], "prompt 2 is None, a NoneType"),
        (["a", 3.5], "prompt 2 is 3.5, a float"),
        ([["a"]], r"prompt 1 is \['a'\], a list"),
        ([b"a"], "prompt 1 is b'a', a bytes"),
        (["a \udc80"], "half character"),
        (iter([]), "0 prompts"),
    ],
)
def test_what_is_no_text_is_refused(prompts: Any, why: str) -> None:
    with pytest.raises(OneStepError, match=why):
        check_prompts(prompts)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"\n \n\xc2\x85\n", "holds no prompt"), ("a caf\xe9".encode("cp1252"), "no UTF-8"), (None, "cannot be read")],
)
def test_files_without_prompts_are_refused_alike(content: bytes | None, why: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    for read in (read_prompts, read_in_python, lambda file: read_in_the_command(str(file))):
        with pytest.raises(OneStepError, match=why):
            read(path)
    with pytest.raises(OneStepError, match="cannot be read"):
        read_prompts(tmp_path)


def test_prompts_of_any_iterable_are_taken() -> None:
    assert check_prompts(text for text in ("a ", " b")) == ["a", "b"]
    assert check_prompts(("a\u2028b",)) == ["a\u2028b"]


def test_a_batchs_texts_are_as_long_as_its_own_longest() -> None:
    """Not as the longest of the run; what is left is what was there."""
    parts = [Cond(torch.randn(1, length, 4)) for length in (3, 5, 5, 9, 2)]
    every, size = Cond.concat(parts), (16, 16)
    prompts = Prompts({size: every[:4]}, {size: every[4:]}, {size: (1, 2, 2)}, 0, torch.device("cpu"))
    for rows, length, masked in (([1, 2], 5, False), ([0, 1], 5, True), ([0], 3, False), ([3, 0], 9, True)):
        batch = prompts.of(size, torch.tensor(rows), 0, range(len(rows)))
        assert batch.null is not None and batch.null.text.shape[1] == 2 and batch.null.mask is None
        assert batch.cond.text.shape[1] == length and (batch.cond.mask is not None) == masked
        for row, text in zip(rows, batch.cond.text, strict=True):
            own = parts[row].text[0]
            assert torch.equal(text[: len(own)], own) and not text[len(own) :].any()
