"""Running graphs beside threads that trace and draw random numbers."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tdc.frontends.fx.captured import alongside, undisturbed


def test_alongside_a_thread_that_traces_nothing_is_taken_from_it() -> None:
    """torch has one stack of pre-dispatch modes for all threads."""

    def other() -> None:
        with alongside(), undisturbed():
            entered.set()
            assert leave.wait(60)

    def traced(x: Tensor) -> Tensor:
        thread.start()
        assert entered.wait(60)
        return x.relu() + 1

    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    graph = make_fx(traced, pre_dispatch=True)(torch.randn(3))
    leave.set()
    thread.join()
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.relu.default,
        torch.ops.aten.add.Tensor,
    ]


def test_random_numbers_are_fixed_and_leave_no_trace_unless_alongside() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with undisturbed():
        first = torch.rand(2)
    with undisturbed():
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(3)
    found = []

    def other() -> None:
        with alongside(), undisturbed():
            found.append(torch.rand(2))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert torch.equal(torch.cat([found[0], torch.rand(2)]), expected)
