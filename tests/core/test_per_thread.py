"""A value that each thread has for itself, and roles that serve the thread that chose them."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from onestep.core.per_thread import PerThread
from onestep.core.roles import Roles
from onestep.core.targets import Target


def in_another_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_each_thread_has_its_own_value() -> None:
    value = PerThread("usual")
    with value.set("mine"):
        assert value.get() == "mine" and in_another_thread(value.get) == "usual"
        with value.set("inner"):
            assert value.get() == "inner"
        assert value.get() == "mine"
        assert copy.deepcopy(value).get() == "mine"
    assert value.get() == "usual" and not value._set


def test_an_error_gives_the_value_back() -> None:
    value = PerThread(0)
    try:
        with value.set(1):
            raise KeyError
    except KeyError:
        pass
    assert value.get() == 0 and not value._set


def test_a_role_serves_the_thread_that_chose_it() -> None:
    """Another thread's forward meanwhile is the base's, or that of the role that it chose."""
    layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    roles = Roles([Target("layer", layer)])
    a, b = torch.ones(1, 3), torch.ones(2, 1)
    roles.load("one", {"layer": (a, b)})
    roles.load("ten", {"layer": (a, 10 * b)})
    roles.install()

    def under(role: str) -> torch.Tensor:
        with roles.use(role), roles.capture(1):
            return layer(x)

    plain = layer(x).detach()
    with roles.use("one"), roles.capture(1):
        torch.testing.assert_close(layer(x), plain + 3)
        torch.testing.assert_close(in_another_thread(lambda: layer(x)), plain)
        torch.testing.assert_close(in_another_thread(lambda: under("ten")), plain + 30)
        torch.testing.assert_close(layer(x), plain + 3)
