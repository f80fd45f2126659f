"""The line between processes, its members in threads: who has come, who differs, when all stop, who has gone."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from xomni_jax.core import process_group as line_module
from xomni_jax.core.distributed import start
from xomni_jax.core.process_group import Line, LineError, split_address


@pytest.fixture
def address():
    """Of a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def left(monkeypatch):
    """Exit codes of members that would have ended their process."""
    codes = []
    monkeypatch.setattr(line_module, "leave", codes.append)
    monkeypatch.setattr(line_module, "GRACE", 0.2)
    return codes


def together(address, facts, deadline=20.0):
    """A Line, or its LineError, for every element of `facts`: {index: facts}."""

    def one(index, said):
        try:
            return Line(address, index, len(facts), said, deadline)
        except LineError as error:
            return str(error)

    with ThreadPoolExecutor(len(facts)) as threads:
        return list(threads.map(one, range(len(facts)), facts))


def until(condition, seconds=10.0):
    """Waits for other threads."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_something_else_answers(address):
    """Such as a proxy."""
    host, port = split_address(address)

    def proxy(server):
        with server, server.accept()[0] as connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=proxy, args=(socket.create_server((host, port)),)).start()
    with pytest.raises(
        LineError, match=f"process 0 at {address} ended before everybody had arrived; .*something else answers at that address"
    ):
        Line(address, 1, 2, {}, 5.0)


def test_all_stop_at_the_same_poll(address, left):
    """Three processes at their own pace; one is told to stop somewhere on the way."""
    lines = together(address, [{"a": 1}] * 3)
    told = threading.Event()
    lines[1].wanted = told.is_set

    def train(line):
        pace = random.Random(line.index)
        for poll in range(1, 100_000):
            if line.reached():
                return poll
            if poll == 20 * (line.index + 1):
                told.set()
            time.sleep(pace.random() * 0.004)

    with ThreadPoolExecutor(3) as threads:
        stopped = list(threads.map(train, lines))
    assert len(set(stopped)) == 1 and stopped[0] > 20
    for line in lines:
        line.finish()
        line.close()
    time.sleep(0.3)
    assert left == []


def test_a_wait_knows_that_the_next_poll_stops(address, left):
    """One waits for something that never comes, the other for the first: both learn in the wait that it is not needed."""
    lines = together(address, [{}] * 2)
    assert not any(line.reached() or line.next_stops() for line in lines)
    lines[0].wanted = lambda: True
    until(lambda: all(line.next_stops() for line in lines))
    assert all(line.reached() for line in lines)
    for line in lines:
        line.close()


def test_a_stop_after_the_last_poll_comes_too_late_for_all(address, left):
    lines = together(address, [{}] * 2)
    lines[0].finish()
    assert not lines[1].reached()
    lines[1].wanted = lambda: True
    until(lambda: lines[1]._target is not None)
    assert not lines[1].next_stops() and not any(lines[1].reached() for _ in range(100))
    for line in lines:
        line.close()


def test_who_has_gone_is_told(address, left, capfd):
    lines = together(address, [{}] * 3)
    lines[2]._over = True  # as if killed: nothing more is said, the connection ends
    lines[2]._socket.shutdown(socket.SHUT_RDWR)
    until(lambda: len(left) == 2)
    assert left == [1, 1]
    assert "xomni: process 2 is gone; process 1 ends too. The same command goes on from the newest checkpoint" in capfd.readouterr().err


def test_an_error_of_one_is_told_to_the_others(address, left, capfd):
    lines = together(address, [{}] * 2)
    lines[1].fail("no reward service answers at http://10.0.0.9:8001")
    until(lambda: left == [1])
    assert "process 1 stopped: no reward service answers at http://10.0.0.9:8001; process 0 ends too" in capfd.readouterr().err


def test_another_configuration_is_refused_by_all(address):
    told = together(address, [{"config.seed": 0, "x": 1}, {"config.seed": 0, "x": 1}, {"config.seed": 3, "x": 1}])
    assert told == ["process 2 was started with config.seed=3, process 0 with 0; start the same command on every host"] * 3


def test_a_number_given_twice_is_refused(address):
    def join(index):
        with pytest.raises(LineError) as error:
            Line(address, index, 3, {}, 2.0)
        return str(error.value)

    with ThreadPoolExecutor(3) as threads:
        told = list(threads.map(join, (0, 1, 1)))
    assert "two processes call themselves 1; number them from 0 to 2" in told


def test_who_did_not_come_is_named(address):
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(Line, address, index, 4, {}, 1.0) for index in (0, 2)]
        for job in jobs:
            with pytest.raises(LineError, match=r"2 of 4 processes arrived within 1 s \(0, 2\); missing: 1, 3. Start the same command"):
                job.result()


def test_nobody_there(address):
    with pytest.raises(LineError, match=f"process 1 cannot reach process 0 at {address} within 0.5 s .*refused.*; start all processes"):
        Line(address, 1, 2, {}, 0.5)


def test_a_port_that_is_taken(address):
    host, port = split_address(address)
    with socket.create_server((host, port)), pytest.raises(LineError, match=f"process 0 cannot listen on port {port} .*in use"):
        Line(address, 0, 2, {}, 0.5)


@pytest.mark.parametrize("text", ["here", "here:", ":80", "here:http", "here:0", "here:70000"])
def test_addresses_that_are_none(text):
    with pytest.raises(LineError, match="write host:port, such as"):
        split_address(text)


@pytest.mark.parametrize(
    "variables, told",
    [
        (dict(XOMNI_PROCESSES="2"), "JAX_COORDINATOR_ADDRESS is not set; a run of several processes needs"),
        (dict(XOMNI_PROCESSES="2", JAX_COORDINATOR_ADDRESS="a:1"), "XOMNI_PROCESS is not set"),
        (
            dict(XOMNI_PROCESSES="2", XOMNI_PROCESS="2", JAX_COORDINATOR_ADDRESS="a:1"),
            "XOMNI_PROCESS=2 of XOMNI_PROCESSES=2: .* from 0 to 1",
        ),
        (dict(XOMNI_PROCESSES="two", XOMNI_PROCESS="0", JAX_COORDINATOR_ADDRESS="a:1"), "XOMNI_PROCESSES='two' is no number"),
        (dict(XOMNI_PROCESSES="2", XOMNI_PROCESS="0", JAX_COORDINATOR_ADDRESS="a"), "the coordinator's address 'a' is none"),
    ],
)
def test_settings_that_contradict(variables, told, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "XOMNI_PROCESSES", "XOMNI_PROCESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LineError, match=told):
        start({})


def test_one_process_needs_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "XOMNI_PROCESSES", "XOMNI_PROCESS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    assert start({}) is None
