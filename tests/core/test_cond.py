"""Conditions are joined, indexed, cast and hashed without a value being changed."""

from __future__ import annotations

import pytest
import torch

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError


def whole(count: int = 3, tokens: int = 4) -> Cond:
    """Every field filled, each row recognisable."""
    text = torch.randn(count, tokens, 5)
    mask = torch.arange(tokens).expand(count, tokens) < tokens - 1
    rows = torch.arange(float(count))
    return Cond(text, mask, torch.randn(count, 6), torch.randn(count, 6) + rows[:, None], rows)


def same(a: Cond, b: Cond) -> bool:
    return a.fingerprint() == b.fingerprint()


def test_texts_of_one_length_are_joined_without_a_mask() -> None:
    first, second = Cond(torch.randn(2, 4, 5)), Cond(torch.randn(1, 4, 5))
    joined = Cond.concat([first, second])
    assert len(joined) == 3 and joined.mask is None
    torch.testing.assert_close(joined.text, torch.cat([first.text, second.text]), rtol=0, atol=0)


def test_texts_of_other_lengths_are_padded_under_a_mask() -> None:
    short, long = Cond(torch.randn(2, 3, 5)), Cond(torch.randn(1, 7, 5))
    joined = Cond.concat([short, long])
    assert joined.mask is not None and joined.mask.dtype == torch.bool
    assert joined.mask.tolist() == [[True] * 3 + [False] * 4] * 2 + [[True] * 7]
    torch.testing.assert_close(joined.text[:2, :3], short.text, rtol=0, atol=0)
    torch.testing.assert_close(joined.text[2:], long.text, rtol=0, atol=0)
    assert bool((joined.text[:2, 3:] == 0).all())


def test_a_mask_that_is_there_is_kept_and_one_that_is_missing_means_all() -> None:
    masked = Cond(torch.randn(1, 3, 5), mask=torch.tensor([[True, False, True]]))
    joined = Cond.concat([masked, Cond(torch.randn(1, 3, 5)), Cond(torch.randn(1, 4, 5))])
    assert joined.mask is not None
    assert joined.mask.tolist() == [[True, False, True, False], [True, True, True, False], [True] * 4]


def test_attention_under_the_mask_is_that_of_the_short_text() -> None:
    """What the padding is for: the answer for the short text stays what it was."""
    short, long = Cond(torch.randn(1, 3, 8)), Cond(torch.randn(1, 7, 8))
    joined, query = Cond.concat([short, long]), torch.randn(2, 2, 8)
    assert joined.mask is not None
    attend = torch.nn.functional.scaled_dot_product_attention
    padded = attend(query, joined.text, joined.text, attn_mask=joined.mask[:, None, :])
    torch.testing.assert_close(padded[:1], attend(query[:1], short.text, short.text))


def test_parts_of_different_kinds_are_not_joined() -> None:
    with pytest.raises(OneStepError, match="pooled is given for 1 of 2"):
        Cond.concat([Cond(torch.randn(1, 3, 5), pooled=torch.randn(1, 4)), Cond(torch.randn(1, 3, 5))])


def test_indexing_takes_the_rows_of_every_field() -> None:
    cond = whole(4)
    for index in (slice(1, 3), torch.tensor([1, 2])):
        part = cond[index]
        assert len(part) == 2
        for name in ("text", "mask", "pooled", "size", "guidance"):
            assert torch.equal(getattr(part, name), getattr(cond, name)[1:3])
    assert same(Cond.concat([cond[0:1], cond[1:4]]), cond)


def test_repeat_repeats_each_row_in_place() -> None:
    cond = whole(3).repeat(2)
    assert cond.guidance is not None and cond.guidance.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(cond.text) == len(cond.pooled) == 6  # type: ignore[arg-type]


def test_the_null_takes_sizes_and_guidance_of_its_samples() -> None:
    cond, null = whole(3, tokens=4), whole(2, tokens=6)
    nulls = cond.null_like(null)
    assert len(nulls) == 3
    for row in range(3):
        assert torch.equal(nulls.text[row], null.text[0]) and torch.equal(nulls.pooled[row], null.pooled[0])  # type: ignore[index]
    assert torch.equal(nulls.size, cond.size) and torch.equal(nulls.guidance, cond.guidance)  # type: ignore[arg-type]
    assert len(Cond.concat([cond, nulls])) == 6


def test_with_changes_one_field_alone() -> None:
    cond = whole()
    told = cond.with_(guidance=torch.full((3,), 3.5))
    assert told.guidance is not None and told.guidance.tolist() == [3.5] * 3 and told.text is cond.text
    assert cond.guidance is not None and cond.guidance.tolist() == [0, 1, 2]
    assert cond.with_(size=None).size is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_casting_leaves_the_mask_boolean(dtype: torch.dtype) -> None:
    cast = whole().to(dtype)
    assert cast.text.dtype == cast.pooled.dtype == dtype  # type: ignore[union-attr]
    assert cast.mask is not None and cast.mask.dtype == torch.bool
    assert whole().to("cpu", dtype).text.dtype == dtype


def test_a_fingerprint_knows_every_value() -> None:
    cond = whole()
    assert same(cond, cond.to("cpu")) and same(cond, whole_copy(cond))
    for name in ("text", "pooled", "size", "guidance"):
        value = getattr(cond, name).clone()
        value.flatten()[-1] += 1e-3
        assert not same(cond, Cond(**{**vars(cond), name: value})), name
    flipped = cond.mask.clone()  # type: ignore[union-attr]
    flipped[0, 0] = False
    assert not same(cond, Cond(**{**vars(cond), "mask": flipped}))
    for name in ("mask", "pooled", "size", "guidance"):
        assert not same(cond, Cond(**{**vars(cond), name: None})), name
    assert not same(cond, cond.to(torch.float64))


def test_a_fingerprint_knows_the_shape_and_the_field() -> None:
    values = torch.arange(12.0)
    assert not same(Cond(values.reshape(1, 3, 4)), Cond(values.reshape(1, 4, 3)))
    text, other = torch.zeros(2, 1, 1), torch.ones(2, 6)
    assert not same(Cond(text, pooled=other), Cond(text, size=other))


def whole_copy(cond: Cond) -> Cond:
    """The same values, laid out otherwise in memory."""
    return Cond(
        **{name: value.t().clone().t() if value.ndim == 2 else value.clone() for name, value in vars(cond).items()}
    )
