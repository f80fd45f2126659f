"""A process group whose members are threads: which process is missing, differs or has ended, and where all stop."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from xomni_jax.core import process_group
from xomni_jax.core.process_group import ProcessGroup, ProcessGroupError, split_address


@pytest.fixture
def address():
    """Of a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def exits(monkeypatch):
    """Exit codes of members that would have ended their process."""
    codes = []
    monkeypatch.setattr(process_group, "exit_now", codes.append)
    monkeypatch.setattr(process_group, "GRACE", 0.2)
    return codes


def join(address, settings, timeout=20.0):
    """A ProcessGroup, or the text of its error, for every element of `settings`."""

    def one(index, own):
        try:
            return ProcessGroup(address, index, len(settings), own, timeout)
        except ProcessGroupError as error:
            return str(error)

    with ThreadPoolExecutor(len(settings)) as threads:
        return list(threads.map(one, range(len(settings)), settings))


def wait_until(condition, seconds=10.0):
    """Waits for other threads."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


# ---- joining ----
def test_another_program_answers(address):
    """Such as a proxy."""

    def proxy(server):
        with server, server.accept()[0] as connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=proxy, args=(socket.create_server(split_address(address)),)).start()
    with pytest.raises(ProcessGroupError, match=f"process 0 at {address} ended before all had joined, .* something else answers at that"):
        ProcessGroup(address, 1, 2, {}, 5.0)


def test_a_connection_from_another_program_is_ignored(address):
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ProcessGroup, address, 0, 2, {}, 10.0)
        stranger = process_group.connect(address, 1, 10.0)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        groups = [threads.submit(ProcessGroup, address, 1, 2, {}, 10.0).result(), first.result()]
    for group in groups:
        group.leave()


def test_different_settings_are_refused_by_all(address):
    told = join(address, [{"config.seed": 0, "x": 1}, {"config.seed": 0, "x": 1}, {"config.seed": 3, "x": 1}])
    assert told == ["process 2 was started with config.seed=3, process 0 with 0; start the same command on every host"] * 3


def test_an_index_given_twice_is_refused(address):
    def one(index):
        with pytest.raises(ProcessGroupError) as error:
            ProcessGroup(address, index, 3, {}, 2.0)
        return str(error.value)

    with ThreadPoolExecutor(3) as threads:
        told = list(threads.map(one, (0, 1, 1)))
    assert "two processes have the index 1; number them from 0 to 2" in told


def test_missing_processes_are_named(address):
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(ProcessGroup, address, index, 4, {}, 1.0) for index in (0, 2)]
        for job in jobs:
            with pytest.raises(
                ProcessGroupError, match=r"2 of 4 processes joined within 1 s \(0, 2\); missing: 1, 3. Start the same command"
            ):
                job.result()


def test_process_0_is_missing(address):
    sentence = f"process 1 cannot reach process 0 at {address} within 0.5 s .*refused.*; start all processes"
    with pytest.raises(ProcessGroupError, match=sentence):
        ProcessGroup(address, 1, 2, {}, 0.5)


def test_a_port_that_is_taken(address):
    sentence = f"process 0 cannot listen on port {split_address(address)[1]} .*in use"
    with socket.create_server(split_address(address)), pytest.raises(ProcessGroupError, match=sentence):
        ProcessGroup(address, 0, 2, {}, 0.5)


@pytest.mark.parametrize("text", ["here", "here:", ":80", "here:http", "here:0", "here:70000"])
def test_texts_that_are_not_addresses(text):
    with pytest.raises(ProcessGroupError, match="write host:port, such as"):
        split_address(text)


# ---- stopping ----
def test_all_stop_at_the_same_poll(address, exits):
    """Three processes at their own pace; one of them asks for a stop on the way, and does so twice."""
    groups = join(address, [{"a": 1}] * 3)

    def train(group):
        pace = random.Random(group.index)
        for poll in range(1, 100_000):
            if group.reached_stop():
                return poll
            if group.index == 1 and poll in (40, 41):
                group.request_stop()
            time.sleep(pace.random() * 0.004)

    with ThreadPoolExecutor(3) as threads:
        stopped = list(threads.map(train, groups))
    assert len(set(stopped)) == 1 and stopped[0] > 40
    for group in groups:
        group.leave()
    time.sleep(0.3)
    assert exits == []


def test_a_wait_learns_that_the_next_poll_stops(address, exits):
    """One waits for something that never comes, the other for the first: both learn while they wait that it is not needed."""
    groups = join(address, [{}] * 2)
    assert not any(group.reached_stop() or group.next_poll_stops() for group in groups)
    groups[0].request_stop()
    wait_until(lambda: all(group.next_poll_stops() for group in groups))
    assert all(group.reached_stop() for group in groups)
    for group in groups:
        group.leave()


def test_nobody_stops_once_a_process_has_finished(address, exits):
    groups = join(address, [{}] * 2)
    assert not groups[0].reached_stop() and not groups[1].reached_stop()
    groups[0].leave()
    wait_until(lambda: 1 == len(groups[0]._server._members))
    groups[1].request_stop()
    time.sleep(0.3)
    assert not groups[1].next_poll_stops() and not any(groups[1].reached_stop() for _ in range(100))
    groups[1].leave()


# ---- ending ----
def test_a_process_that_is_gone_is_named(address, exits, capfd):
    groups = join(address, [{}] * 3)
    groups[2]._leaving = True  # as if killed: it sends nothing, and its connection ends
    groups[2]._connection.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: len(exits) == 2)
    assert exits == [1, 1]
    assert "xomni: process 2 is gone; process 1 ends too. The same command resumes from the newest checkpoint" in capfd.readouterr().err


def test_an_error_of_one_is_told_to_the_others(address, exits, capfd):
    groups = join(address, [{}] * 2)
    groups[1].leave("no reward service answers at http://10.0.0.9:8001")
    wait_until(lambda: exits == [1])
    assert "process 1 stopped: no reward service answers at http://10.0.0.9:8001; process 0 ends too" in capfd.readouterr().err


def test_process_0_is_gone(address, exits, capfd):
    groups = join(address, [{}] * 2)
    groups[0]._leaving = True
    for connection in list(groups[0]._server._members.values()):
        connection.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: exits == [1])
    assert "xomni: process 0 is gone; process 1 ends too" in capfd.readouterr().err


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_is_stopped_is_named(silent, address, exits, capfd, monkeypatch):
    """As SIGSTOP leaves it: its connections stay open, and nothing comes over them."""
    monkeypatch.setattr(process_group, "PULSE", 0.05)
    monkeypatch.setattr(process_group, "SILENCE", 1.0)
    groups = join(address, [{}] * 2)
    time.sleep(1.5)
    assert exits == []  # both are alive, though nobody has anything to say
    groups[silent]._leaving = True
    if silent == 0:
        monkeypatch.setattr(process_group, "send", lambda connection, **message: None)
    wait_until(lambda: exits == [1])
    assert f"xomni: process {silent} has not answered for 1 s: it hangs, is stopped or cut off; process" in capfd.readouterr().err
