import os
import signal
import threading

import pytest

from blip2.training.interruption import catch_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_is_noted_and_the_second_does_what_it_always_did(number):
    arrived = []
    outside = signal.signal(number, lambda *_: arrived.append("outside"))
    try:
        with catch_signals() as asked:
            assert asked == []
            os.kill(os.getpid(), number)
            assert asked == [number] and arrived == []
            os.kill(os.getpid(), number)
            assert asked == [number] and arrived == ["outside"]
        os.kill(os.getpid(), number)
        assert arrived == ["outside", "outside"]
    finally:
        signal.signal(number, outside)


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), catch_signals():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_it_does_nothing():
    """Signals can only be handled there; training in a thread of a notebook or a service must work all the same."""
    found = []

    def run():
        with catch_signals() as asked:
            found.append(asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[]]
