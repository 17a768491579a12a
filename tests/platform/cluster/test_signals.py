import os
import signal
import threading

import pytest

from animediffusion.platform.cluster.signals import StopSignals, handling


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def send_both(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    assert (stop.number, stop.wait()) == (signal.SIGTERM, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_asks_and_the_second_interrupts():
    before, asked = handlers(), []
    stop = StopSignals(lambda: asked.append(1))
    assert stop.number is None
    with stop, pytest.raises(KeyboardInterrupt):
        send_both(stop)
    assert (asked, handlers()) == ([1], before)


def test_waiting_ends_with_a_signal_that_arrives_meanwhile():
    with StopSignals() as stop:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert stop.wait() == signal.SIGINT


def test_only_the_named_signals_are_handled():
    before, received = handlers(), []
    with handling(received.append, [signal.SIGTERM]):
        assert signal.getsignal(signal.SIGINT) == before[0]
        os.kill(os.getpid(), signal.SIGTERM)
    assert (received, handlers()) == ([signal.SIGTERM], before)


def test_another_thread_than_the_main_one_changes_nothing():
    before, seen = handlers(), []

    def body():
        with StopSignals() as stop:
            seen.extend([handlers(), stop.number])

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before, None]
