"""One network in two threads: what one of them hangs in it never acts in the other's pictures."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from narrowed import narrowed
from tiny_pipelines import make

from onestep.core.errors import OneStepError
from onestep.pipelines.one_step import OneStepPipeline
from onestep.pipelines.steer import steered
from onestep.pipelines.threads import is_here, lock_of, only_here, set_processors

CALL: dict[str, Any] = {"seed": 3, "width": 16, "height": 16, "output_type": "latent"}
PRESETS = {"sd": "dmd2-4", "sdxl": "sdxl-lightning-2", "sd3": "sd3.5-turbo-4", "flux": "flux-schnell-4"}


@pytest.fixture(autouse=True)
def threads_that_take_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def together(times: int, *draws: Callable[[], torch.Tensor]) -> None:
    """Each in a thread of its own, again and again: always the picture that it draws alone."""
    alone, wrong = [draw() for draw in draws], []

    def work(draw: Callable[[], torch.Tensor], expected: torch.Tensor) -> None:
        for _ in range(times):
            try:
                gap = float((draw() - expected).abs().max())
            except Exception as error:
                wrong.append(repr(error))
                return
            if gap > 1e-4:
                wrong.append(gap)
                return

    threads = [threading.Thread(target=work, args=pair) for pair in zip(draws, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len({round(float(picture.sum()), 3) for picture in alone}) == len(alone)  # they differ, so the test is one


@pytest.mark.parametrize("name", narrowed(PRESETS, "sd"))
def test_a_steered_picture_beside_a_plain_one(name: str) -> None:
    fast = OneStepPipeline.from_pipe(make(name), recipe=PRESETS[name])
    together(
        6,
        lambda: fast("a cat", **CALL).images,
        lambda: fast("a cat", negative_prompt="red", steering="nag", **CALL).images,
        lambda: fast("a cat", negative_prompt="dog", steering="nasa", **CALL).images,
    )


def test_diffusers_own_pipeline_beside_a_steered_one() -> None:
    """Neither waits for the other, and neither changes the other's picture."""
    pipe = make("sd")
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1, "output_type": "latent", "width": 16}
    one, two = (type(pipe)(**pipe.components, requires_safety_checker=False) for _ in range(2))
    for each in (one, two):
        each.set_progress_bar_config(disable=True)
        each.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    text = pipe.encode_prompt(["a cat", "red"], "cpu", 1, False)[0]

    def draw(which: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return which(prompt_embeds=text[:1], height=16, generator=generator, **call).images

    def away() -> torch.Tensor:
        with steered(two, text[1:], "nag"):
            return draw(two)

    together(6, lambda: draw(one), away)


def test_another_threads_call_within_is_plain_and_the_second_steering_waits() -> None:
    pipe = make("sd")
    text = pipe.encode_prompt(["red", "dog"], "cpu", 1, False)[0]
    inputs = (torch.ones(1, 4, 8, 8), 500, text[:1])
    plain, order = pipe.unet(*inputs)[0], []

    def elsewhere(call: Callable[[], Any]) -> threading.Thread:
        thread = threading.Thread(target=call)
        thread.start()
        return thread

    def also() -> None:
        with steered(pipe, text[1:], "nag"):
            order.append("second")

    with torch.no_grad(), steered(pipe, text[1:], "nag"):
        steered_here, found = pipe.unet(*inputs)[0], []
        elsewhere(lambda: found.append(pipe.unet(*inputs)[0].detach())).join()
        waiting = elsewhere(also)
        waiting.join(0.2)
        order.append("first")
    waiting.join(60)
    assert order == ["first", "second"]
    assert torch.equal(found[0], plain) and (steered_here - plain).abs().max() > 1e-3
    with steered(pipe, text[1:]), pytest.raises(OneStepError, match="steered already"), steered(pipe, text[1:]):
        pass


@pytest.mark.broad
def test_a_compiled_network_that_another_thread_steers_is_refused_in_words() -> None:
    pipe = make("sd")
    text = pipe.encode_prompt(["red"], "cpu", 1, False)[0]
    pipe.unet, found = torch.compile(pipe.unet, backend="eager"), []

    def draw() -> None:
        try:
            pipe.unet(torch.ones(1, 4, 8, 8), 500, text)
        except OneStepError as error:
            found.append(str(error))

    with steered(pipe, text, "nag"):
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    assert len(found) == 1 and "another thread steers" in found[0]
    draw()
    assert len(found) == 1


def test_the_networks_tree_is_the_same_while_it_is_steered() -> None:
    pipe = make("sd")
    names = [name for name, _ in pipe.unet.named_modules()]
    processors = pipe.unet.attn_processors
    text = pipe.encode_prompt(["red"], "cpu", 1, False)[0]
    with steered(pipe, text, "nag"):
        assert [name for name, _ in pipe.unet.named_modules()] == names
        assert all(
            found is not processors[name] for name, found in pipe.unet.attn_processors.items() if "attn2" in name
        )
    assert pipe.unet.attn_processors == processors
    own = torch.nn.Linear(1, 1)  # a processor that is a module, as an IP-Adapter's
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(own)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.processor"
    set_processors(pipe.unet, {key: AttnProcessor2_0()})
    assert attention.processor is not own and attention._modules["processor"] is own
    set_processors(pipe.unet, {key: own})
    assert attention.processor is own and "processor" not in attention.__dict__


def test_locks_and_hooks_are_of_their_thread() -> None:
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert lock_of(first) is lock_of(first) and lock_of(first) is not lock_of(second)
    assert is_here(threading.get_ident()) and not is_here(-1)
    calls: list[Any] = []
    hook = only_here(lambda module, args, more: calls.append(more))
    hook(first, (), {"a": 1})
    for given in ((first, ()), (first, (), {})):
        thread = threading.Thread(target=lambda given=given: hook(*given))
        thread.start()
        thread.join()
    assert calls == [{"a": 1}]
