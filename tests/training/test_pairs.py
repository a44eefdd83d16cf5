"""Prompts and teacher pairs: embedded once, drawn the same whoever asks, ends of the teacher's own ODE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_host import PROMPTS, SmallHost, small

from onestep.core import randomness
from onestep.core.errors import OneStepError
from onestep.core.sampling import teacher_sample
from onestep.training.data import pairs as module
from onestep.training.data.pairs import Pairs, teach
from onestep.training.engine.prompts import check_prompts, embed
from onestep.training.settings import Settings


def made(folder: Path, settings: Settings, host: SmallHost | None = None) -> Pairs:
    host = host or SmallHost()
    return Pairs(host, embed(host, PROMPTS, settings, folder / "embeddings"), settings, folder / "pairs")


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_stripped_and_checked() -> None:
    assert check_prompts([" a ", "b\n"]) == ["a", "b"]
    for prompts, words in [([], "0 prompts"), (["a"] * 100_001, "100001 prompts"), (["a", " "], "prompt 2 is empty")]:
        with pytest.raises(OneStepError, match=words) as caught:
            check_prompts(prompts)
        assert len(str(caught.value)) < 400
    check_prompts(["x" * 4000])
    with pytest.raises(OneStepError, match="prompt 1 has 4001 characters"):
        check_prompts(["x" * 4001])


def test_embeddings_are_the_hosts_and_kept(tmp_path: Path) -> None:
    """By prompts, negative text and encoder: another of any of them is embedded anew; one file serves every size."""
    host = SmallHost()
    prompts = embed(host, PROMPTS, small(negative="ugly"), tmp_path)
    wanted = host.encode([*PROMPTS, "ugly"], (32, 32))
    null = prompts.nulls[(32, 32)]
    assert null is not None and torch.equal(null.text, wanted.text[-1:])
    assert torch.equal(prompts.conds[(32, 32)].text, wanted.text[:-1]) and len(prompts) == len(PROMPTS)
    host.encoded = 0
    embed(host, PROMPTS, small(negative="ugly"), tmp_path)
    assert host.encoded == 0
    for changes, count in (({"negative": "bad"}, 6), ({"sizes": "40x32,32x40"}, 0)):
        host.encoded = 0
        embed(host, PROMPTS, small(**{"negative": "ugly", **changes}), tmp_path)
        assert host.encoded == count
    host.encoded, host.encoder_hash = 0, "other words"
    embed(host, PROMPTS, small(negative="ugly"), tmp_path)
    assert host.encoded == 6


def test_a_base_with_embedded_guidance_is_told_it_everywhere(tmp_path: Path) -> None:
    host = SmallHost()
    host.denoiser.guidance = "embedded"
    prompts = embed(host, PROMPTS, small(guidance=2.5, matching_guidance=1.0), tmp_path)
    told = prompts.batch(0, range(4)).cond.guidance
    assert told is not None and told.unique().numel() == 1 and prompts.nulls[(32, 32)] is None


def test_a_batch_has_one_size_and_all_sizes_come(tmp_path: Path) -> None:
    host = SmallHost()
    prompts = embed(host, PROMPTS, small(sizes="32x32,40x24,24x40"), tmp_path)
    shapes = [prompts.batch(key, range(3)).shape for key in range(40)]
    assert set(shapes) == {(2, 4, 4), (2, 3, 5), (2, 5, 3)}
    assert prompts.batch(7, range(3)).normal("x").shape == (3, *shapes[7])
    assert prompts.batch(7, [0]).shape == prompts.batch(7, [2]).shape, "whatever the micro-batch"


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_a_pair_is_the_end_of_the_teachers_ode(tmp_path: Path) -> None:
    """From its own noise, under guidance, without adapters; no student has a say in it."""
    host, settings = SmallHost(), small(guidance=2.5, teacher_steps=4)
    pairs = made(tmp_path, settings, host)
    host.denoiser.roles.add("student", 2, 0)
    for _, b in host.denoiser.roles.state("student").values():
        b.normal_()
    with host.denoiser.roles.installed(), host.denoiser.roles.use("student"):
        batch, (noise, target) = pairs.draw(pairs.prompts.batch(0, range(4)), 0)
    wanted_noise = randomness.normal((2, 4, 4), settings.seed, "pair noise", 0, range(4))
    assert torch.equal(noise, wanted_noise)
    with torch.no_grad():
        wanted = teacher_sample(host.denoiser, batch.cond, batch.nulls(), noise, 4, 2.5)
    torch.testing.assert_close(target, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("update", [0, 1, 5])
def test_a_pair_is_the_same_whoever_asks(tmp_path: Path, update: int) -> None:
    """Whole batches and micro-batches, new pairs (updates 0 and 1) and ones drawn again, from memory or disk."""
    found = []
    for attempt, cut in enumerate([[range(4)], [range(2), range(2, 4)], [range(3), range(3, 4)]]):
        pairs = made(tmp_path / str(attempt % 2), small(), SmallHost())
        parts = [pairs.draw(pairs.prompts.batch(17, rows), update) for rows in cut]
        joined = [torch.cat([part[1][side] for part in parts]) for side in (0, 1)]
        found.append([torch.cat([part[0].cond.text for part in parts]), *joined])
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])
        torch.testing.assert_close(other[2], found[0][2], rtol=1e-4, atol=1e-4)


def test_pairs_are_new_while_there_are_new_ones(tmp_path: Path) -> None:
    """8 pairs in batches of 4: two blocks, made once each, then drawn again at random, of the batch's size."""
    pairs = made(tmp_path, small(sizes="32x32,40x24"))
    assert pairs.blocks == 2
    seen: list[bytes] = []
    for update in range(12):
        batch, (noise, target) = pairs.draw(pairs.prompts.batch(update, range(4)), update)
        assert noise.shape[1:] == target.shape[1:] == batch.shape
        seen += [row.numpy().tobytes() for row in noise]
    assert len(set(seen[:8])) == 8 and set(seen[8:]) <= set(seen[:8]) and len(set(seen[8:])) > 4
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == ["000000.safetensors", "000001.safetensors"]


def test_every_size_has_a_pair(tmp_path: Path) -> None:
    """Fewer pairs than sizes are asked for: each size has a block all the same."""
    pairs = made(tmp_path, small(sizes="32x32,40x24,24x40", pairs=1))
    assert pairs.blocks == 3
    for update in range(20):
        batch, (noise, _) = pairs.draw(pairs.prompts.batch(update, range(4)), update)
        assert noise.shape[1:] == batch.shape


def test_memory_holds_so_many_and_the_disk_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * 2 * 4 * 2 * 16 * 4)
    settings = small(pairs=24)
    pairs, kept = made(tmp_path / "few", settings), made(tmp_path / "all", settings)
    kept_bytes = []
    for update in range(18):
        batch = pairs.prompts.batch(update, range(4))
        _, (noise, target) = pairs.draw(batch, update)
        kept_bytes.append(len(pairs._kept))
        monkeypatch.setattr(module, "KEPT_BYTES", 2**30)
        _, (wanted_noise, wanted) = kept.draw(batch, update)
        monkeypatch.setattr(module, "KEPT_BYTES", 2 * 2 * 4 * 2 * 16 * 4)
        assert torch.equal(noise, wanted_noise) and torch.equal(target, wanted)
    assert max(kept_bytes) <= 2 and len(kept._kept) == 6


def test_a_base_without_a_null_teaches_unguided(tmp_path: Path) -> None:
    host = SmallHost()
    host.denoiser.guidance = "none"
    pairs = made(tmp_path, small(guidance=4.0), host)
    batch = pairs.prompts.batch(0, range(2))
    noise = batch.normal("x")
    with torch.no_grad():
        wanted = teacher_sample(host.denoiser, batch.cond, None, noise, 3, 1.0)
    torch.testing.assert_close(teach(host, pairs.settings, batch, noise), wanted)
