"""Calls run beside other Python threads, end when they are told to, and leave the engine usable."""

import contextlib
import os
import signal
import sys
import threading

import pytest
import torch

import comfytp

ROWS, WIDTH, LAYERS = 1024, 512, 300


@pytest.fixture(scope="module", params=["cpu:0", "cpu:0,cpu:1"])
def long_call(request):
    """An engine whose call takes seconds, with its input."""
    graph = comfytp.Graph()
    x = graph.input("x", [ROWS, WIDTH])
    w = graph.weight("w", [WIDTH, WIDTH])
    for i in range(LAYERS):
        x = graph.add("linear", [graph.add("sin", [x]), w], name=f"layer.{i}")
    graph.output("y", x)
    engine = comfytp.Engine(graph, {"w": torch.eye(WIDTH)}, request.param)
    engine.load()
    return engine, torch.rand(ROWS, WIDTH)


class Caller(threading.Thread):
    """Calls the engine on a thread of its own; `outcome` is what came of it."""

    def __init__(self, engine, x):
        super().__init__()
        self.engine, self.x, self.outcome = engine, x, None
        self.start()

    def run(self):
        try:
            self.outcome = self.engine(x=self.x)
        except comfytp.Error as error:
            self.outcome = error


def cancel_until_over(caller):
    """A cancel without a running call does nothing, so one that comes too early is said again."""
    while caller.is_alive():
        caller.engine.cancel()
        caller.join(0.01)


def test_another_thread_cancels_and_python_runs_meanwhile(long_call):
    engine, x = long_call
    caller = Caller(engine, x)
    steps = sum(1 for _ in range(100_000))  # would not end before the call if the GIL were held, and the cancel come too late
    cancel_until_over(caller)
    assert steps == 100_000
    assert isinstance(caller.outcome, comfytp.Cancelled)


def test_the_engine_is_usable_after_a_cancel(long_call):
    engine, x = long_call
    caller = Caller(engine, x)
    cancel_until_over(caller)
    engine.cancel()  # nothing runs: nothing happens
    y = engine(x=x)["y"]
    expected = x
    for _ in range(LAYERS):
        expected = expected.sin()
    assert torch.allclose(y, expected, rtol=1e-3)


def codes(frame):
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def wait_until_running(thread):
    while comfytp.Engine.run.__code__ not in codes(sys._current_frames()[thread]):
        threading.Event().wait(0.001)


@contextlib.contextmanager
def ctrl_c_when_running():
    """Ctrl-C as soon as the main thread is within a call."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored

    def interrupt():
        wait_until_running(threading.main_thread().ident)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    try:
        yield
    finally:
        sender.join()
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_call(long_call):
    engine, x = long_call
    with ctrl_c_when_running(), pytest.raises(KeyboardInterrupt):
        engine(x=x)
    assert engine.stats()["calls"] >= 1


def test_ctrl_c_of_a_call_that_waits_for_its_turn_lets_the_other_run(long_call):
    engine, x = long_call
    calls = engine.stats()["calls"]
    caller = Caller(engine, x)
    try:
        wait_until_running(caller.ident)
        threading.Event().wait(0.05)  # it has its turn
        with ctrl_c_when_running(), pytest.raises(KeyboardInterrupt):
            engine(x=x)
        assert caller.is_alive(), "nor is it waited for"
    finally:
        caller.join()
    assert isinstance(caller.outcome, dict) and engine.stats()["calls"] == calls + 1


def test_calls_from_many_threads_take_turns(long_call):
    graph = comfytp.Graph()
    graph.output("y", graph.add("linear", [graph.input("x", [4, 4]), graph.weight("w", [4, 4])]))
    engine = comfytp.Engine(graph, {"w": 2 * torch.eye(4)}, "cpu:0,cpu:1")
    callers = [Caller(engine, torch.full((4, 4), float(i))) for i in range(16)]
    for i, caller in enumerate(callers):
        caller.join()
        assert torch.equal(caller.outcome["y"], torch.full((4, 4), 2.0 * i))


def test_a_device_that_waits_too_long_ends_the_call():
    graph = comfytp.Graph()
    x = graph.input("x", [ROWS, WIDTH])
    for i in range(8):  # the sum over the devices makes each wait for the other
        x = graph.add("linear", [graph.add("silu", [graph.add("linear", [x, graph.weight(f"a{i}", [WIDTH, WIDTH])])]), graph.weight(f"b{i}", [WIDTH, WIDTH])])
    graph.output("y", x)
    weights = {f"{n}{i}": torch.eye(WIDTH) for n in "ab" for i in range(8)}
    engine = comfytp.Engine(graph, weights, "cpu:0,cpu:1", "tensor=15:1", timeout=1e-9)
    with pytest.raises(comfytp.Timeout):
        engine(x=torch.ones(ROWS, WIDTH))


def test_errors_are_one_family():
    assert issubclass(comfytp.Error, RuntimeError)
    assert issubclass(comfytp.Cancelled, comfytp.Error) and issubclass(comfytp.Timeout, comfytp.Error)
    assert issubclass(comfytp.OutOfMemory, comfytp.DeviceFailure) and issubclass(comfytp.DeviceFailure, comfytp.Error)
    assert comfytp.Error.__module__ == comfytp.OutOfMemory.__module__ == "comfytp"


def test_too_little_memory_is_an_error_of_its_own():
    graph = comfytp.Graph()
    graph.output("y", graph.add("linear", [graph.input("x", [4, 64]), graph.weight("w", [64, 64])]))
    engine = comfytp.Engine(graph, {"w": torch.eye(64)}, "cpu:0@1KiB")
    with pytest.raises(comfytp.OutOfMemory, match="cpu:0 needs .* a limit of"):
        engine(x=torch.ones(4, 64))


def test_the_prompts_part_runs_once_per_prompt():
    graph = comfytp.Graph()
    prompt = graph.add("linear", [graph.input("prompt", [4, 8], varies="prompt"), graph.weight("w", [8, 8])])
    graph.output("y", graph.add("add", [graph.input("x", [4, 8]), prompt]))
    engine = comfytp.Engine(graph, {"w": torch.eye(8)}, "cpu:0,cpu:1")
    first, second = torch.ones(4, 8), torch.full((4, 8), 2.0)
    for prompt, prologues in ((first, 1), (first.clone(), 1), (second, 2), (second, 2)):
        for x in (torch.zeros(4, 8), torch.ones(4, 8)):
            assert torch.equal(engine(x=x, prompt=prompt)["y"], x + prompt)
        assert engine.stats()["prologues"] == prologues
    prompt = first.clone()
    engine(x=first, prompt=prompt)
    prompt += 5  # told by content, not by where it lies
    assert torch.equal(engine(x=first, prompt=prompt)["y"], first + prompt)


def test_unload_frees_and_the_next_call_loads_again():
    graph = comfytp.Graph()
    graph.output("y", graph.add("linear", [graph.input("x", [4, 64]), graph.weight("w", [64, 64])]))
    engine = comfytp.Engine(graph, {"w": torch.eye(64)}, "cpu:0,cpu:1")
    assert sum(engine.stats()["allocated_weight_bytes"]) == 0
    x = torch.randn(4, 64)
    y = engine(x=x)["y"]
    assert sum(engine.stats()["allocated_weight_bytes"]) >= 64 * 64 * 4
    engine.unload()
    assert sum(engine.stats()["allocated_weight_bytes"]) == 0
    assert torch.equal(engine(x=x)["y"], y)


def test_a_communicator_is_chosen_by_name():
    graph = comfytp.Graph()
    graph.output("y", graph.add("linear", [graph.input("x", [4, 64]), graph.weight("w", [64, 64])]))
    weights, x = {"w": torch.eye(64)}, torch.randn(4, 64)
    for name in (None, "best", "peer", "staged"):  # between CPUs there is one way
        assert torch.allclose(comfytp.Engine(graph, weights, "cpu:0,cpu:1", communicator=name)(x=x)["y"], x)
    with pytest.raises(comfytp.Error, match="expected a communicator 'best', 'peer' or 'staged' but got 'pigeon'"):
        comfytp.Engine(graph, weights, communicator="pigeon")
