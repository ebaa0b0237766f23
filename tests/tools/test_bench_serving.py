"""The serving benchmark: its load on a server of known behaviour, its processes, and its report."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from serve.errors import BackendStartError
from tests.conftest import accept_ctrl_c
from tools.bench.pages import markers
from tools.bench.serving import runs, sleep_model
from tools.bench.serving.load import Load, measure, quantile
from tools.bench.serving.load_process import LoadProcess
from tools.bench.serving.process import ManagedProcess, cpu_seconds, pause, resume
from tools.bench.serving.report import Report
from tools.bench.serving.runs import Machine, Plan, Result, Row
from tools.bench.serving.targets import GATEWAY, Target, Workload, sleep_archive
from tools.commands import replace_renamed

ROOT = Path(__file__).parents[2]
BEGIN, END = markers()
ONE_BY_ONE_S = 0.02


class KnownServer:
    """Server that answers one request at a time after `ONE_BY_ONE_S`, with the status line `failing` if set."""

    def __init__(self) -> None:
        self.failing: bytes | None = None
        self.asked = 0
        self._loop = asyncio.new_event_loop()
        self._line = asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                (length,) = (
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.startswith(b"content-length")
                )
                body = await reader.readexactly(length)
                self.asked += 1
                async with self._line:
                    # The load is measured in real time, so this is no fake clock.
                    await asyncio.sleep(ONE_BY_ONE_S)
                answer = json.dumps({"bytes": len(body), "batch": 1}).encode()
                status = b"200 OK" if self.failing is None else self.failing
                writer.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status, len(answer), answer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def known():
    server = KnownServer()
    yield server
    server.close()


@pytest.fixture
def asking(known, tmp_path):
    body = tmp_path / "frame.bin"
    body.write_bytes(bytes(1000))
    return Load(
        "127.0.0.1", known.port, "/predict", str(body), warmup_s=0.1, seconds=0.8, expect={"bytes": 1000}
    )


def changed(load: Load, **values) -> Load:
    return Load(**{**load.__dict__, **values})


@pytest.mark.timing
def test_closed_loop_measures_rate_and_latency(asking):
    measured = measure(changed(asking, clients=4))
    assert measured.failed == 0 and not measured.failures
    # Four clients, served one at a time: each waits for four; a busy machine is only slower.
    assert 25 <= measured.rate <= 1 / ONE_BY_ONE_S * 1.05
    assert measured.p50_ms >= 4 * ONE_BY_ONE_S * 1e3 * 0.95
    assert measured.rate == pytest.approx(4e3 / measured.mean_ms, rel=0.2)
    assert measured.mean_batch == 1
    assert measured.total >= measured.answered


def test_open_loop_counts_latency_from_the_scheduled_arrival(asking):
    measured = measure(changed(asking, rate=15.0, seconds=1.5))
    assert not measured.overrun and measured.failed == 0
    assert measured.p99_ms >= measured.p50_ms >= ONE_BY_ONE_S * 1e3 * 0.95


def test_open_loop_reports_an_overrun(asking):
    assert measure(changed(asking, rate=400.0, seconds=1.2)).overrun


def test_load_stops_at_max_requests(asking, known):
    measure(changed(asking, clients=2, max_requests=5))
    assert known.asked == 5


@pytest.mark.parametrize(
    ("expect", "reason"), [({"bytes": 7}, "wrong answer"), ({"boxes": 1}, "unreadable answer")]
)
def test_response_with_other_content_counts_as_failed(asking, expect, reason):
    measured = measure(changed(asking, clients=1, expect=expect))
    assert measured.answered == 0 and set(measured.failures) == {reason}


def test_error_status_counts_as_failed_by_status(asking, known):
    known.failing = b"503 Service Unavailable"
    measured = measure(changed(asking, clients=2))
    assert measured.answered == 0 and set(measured.failures) == {"503"}
    assert measured.p50_ms is None and measured.rate == 0


def test_refused_connection_fails_without_busy_loop(asking, free_ports):
    (port,) = free_ports(1)
    measured = measure(changed(asking, clients=1, port=port))
    assert set(measured.failures) == {"ConnectionRefusedError"} and measured.failed <= 100


def test_quantile_returns_an_observed_value():
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.5, 0.99, 0.25)] == [2.0, 4.0, 1.0]
    assert quantile([5.0], 0.5) == 5.0


def test_load_process_measures_and_exits(asking):
    with LoadProcess() as load:
        process = psutil.Process(load.pid)
        assert load.measure(changed(asking, clients=1, seconds=0.2)).answered
    assert not process.is_running()


def test_sleep_model_takes_its_nominal_time():
    began = time.perf_counter()
    assert sleep_model.answers([3, 4]) == [{"bytes": 3, "batch": 2}, {"bytes": 4, "batch": 2}]
    assert time.perf_counter() - began >= 0.024
    assert sleep_model.lone_s() == pytest.approx(0.022) and sleep_model.ideal_rate() == pytest.approx(
        307.7, abs=0.1
    )


# Processes


SPIN = "import sys; print('spinning', flush=True)\nwhile True: pass"


def test_paused_process_uses_no_cpu_and_resumes():
    with ManagedProcess("a loop", [sys.executable, "-c", SPIN]) as server:
        pause(server.pid)
        # A stop takes effect at the next tick.
        while psutil.Process(server.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        before = cpu_seconds([server.pid])
        assert cpu_seconds([server.pid]) == before
        resume(server.pid)
        deadline = time.monotonic() + 20
        while cpu_seconds([server.pid]) == before:
            assert time.monotonic() < deadline
        pause(server.pid)  # a paused process is ended too
        child = psutil.Process(server.pid)
    assert not child.is_running()


def test_process_that_exits_during_start_reports_its_log():
    with (
        ManagedProcess("it", [sys.executable, "-c", "import sys; sys.exit('no port left')"]) as server,
        pytest.raises(BackendStartError, match=r"^it .*no port left"),
    ):
        server.wait_for("ready", 20)


def test_killed_benchmark_leaves_no_process(tmp_path):
    code = (
        "import sys, time\nfrom tools.bench.serving.process import ManagedProcess\n"
        f"with ManagedProcess('it', [sys.executable, '-c', {SPIN!r}]) as server:\n"
        "    print(server.pid, flush=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    child.wait(20)


@pytest.mark.torchserve
@pytest.mark.slow
def test_gateway_and_torchserve_are_measured_and_a_peer_that_is_not_installed_is_skipped(tmp_path):
    """The short form of the next test, of which the times are not judged."""
    workload = Workload("sleep", sleep_archive(tmp_path), "sleep", (), reports_batch=True)
    plan = Plan(bytes(16_000), 1, lone_s=0.3, rate=50.0, open_s=0.5, clients=8, closed_s=0.4)
    targets = (GATEWAY, "TorchServe batch 1", "mosec, 1 ms")
    (result,) = runs.measure(workload, [plan], tmp_path, tmp_path / "bin" / "python", only=targets)
    assert set(result.rows) == {GATEWAY, "TorchServe batch 1"}
    assert all(row.failed == 0 and row.lone_ms >= 22 for row in result.rows.values())
    assert result.rows[GATEWAY].closed_batch > 1
    assert list(result.skipped) == ["mosec, 1 ms"] and "make bench-env" in result.skipped["mosec, 1 ms"]


@pytest.mark.torchserve
@pytest.mark.slow
@pytest.mark.soak
def test_command_measures_the_gateway_and_prints_json_last(tmp_path):
    ran = bench("--quick", "--models", "sleep", "--only", GATEWAY, "TorchServe batch 1", "LitServe")
    output, errors = ran.communicate(timeout=280)
    assert ran.returncode == 0, errors
    document = json.loads(output.splitlines()[-1])
    (result,) = document["results"]
    rows = result["rows"]
    assert set(rows) == {GATEWAY, "TorchServe batch 1"} and list(result["skipped"]) == ["LitServe"]
    assert all(row["failed"] == 0 and row["lone_ms"] >= 22 for row in rows.values())
    assert rows["TorchServe batch 1"]["overrun"] and not rows[GATEWAY]["overrun"]
    assert (
        rows[GATEWAY]["closed_batch"] > 8 and rows[GATEWAY]["rate"] > 2 * rows["TorchServe batch 1"]["rate"]
    )
    assert rows[GATEWAY]["idle_cpu"] < 0.05


@pytest.mark.torchserve
@pytest.mark.slow
def test_ctrl_c_leaves_no_process(tmp_path):
    ran = bench("--quick", "--models", "sleep", "--only", GATEWAY, "TorchServe batch 1")
    me = psutil.Process(ran.pid)
    deadline = time.monotonic() + 120
    while not any("gateway" in each.cmdline() for each in me.children(recursive=True)):
        assert ran.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    below = me.children(recursive=True)
    ran.send_signal(signal.SIGINT)
    _, errors = ran.communicate(timeout=60)
    assert ran.returncode == 130 and errors.endswith("stopped\n")
    psutil.wait_procs(below, timeout=20)
    assert not [each for each in below if each.is_running()]


def bench(*arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "tools.bench",
        "serving",
        "--bench-python",
        "/nowhere/python",
        *arguments,
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=accept_ctrl_c,
    )


# The report

SMALL = Plan(bytes(16_000), 3, 1.0, 100.0, 4.0, 64, 2.0)
MEDIUM = Plan(bytes(276_000), 2, 1.0, 100.0, 4.0, 64, 2.0)


def report(ours: Row, others: float = 0.0) -> Report:
    rows = {
        "TorchServe batch 1": Row(lone_ms=24.0, rate=42.0, overrun=True),
        GATEWAY: ours,
        "mosec, 1 ms": Row(lone_ms=25.0, p50_ms=44.0, p99_ms=66.0, rate=299.0),
    }
    results = [
        Result("sleep", 16_000, SMALL, rows, {"BentoML": "it is not there"}, others),
        Result("sleep", 276_000, MEDIUM, rows, {}, others),
    ]
    return Report(results, Machine(2, 0.1, others, 1.5), "2026-01-31", quick=False)


GOOD = Row(lone_ms=25.5, p50_ms=43.0, p99_ms=65.0, rate=301.0, own_cpu_ms=1.2, idle_cpu=0.0)


def test_verdicts_follow_the_rows():
    assert all(line.startswith("holds") for line in report(GOOD).verdicts())
    slow = Row(lone_ms=26.5, p50_ms=44.5, p99_ms=66.5, rate=298.0, own_cpu_ms=1.6, idle_cpu=0.1)
    verdicts = report(slow).verdicts()
    assert len(verdicts) == 6 and all(line.startswith("MISSED") for line in verdicts)


def test_table_shows_overruns_and_skipped_peers():
    table = report(GOOD).table()
    assert "overrun" in table and "skipped BentoML: it is not there" in table


def test_busy_machine_adds_a_warning():
    assert "warning" not in report(GOOD).table()
    assert "warning: the machine was busy" in report(GOOD, others=1.2).table()


def test_json_line_has_rows_day_and_aims():
    document = json.loads(report(GOOD).json_line())
    assert document["results"][0]["rows"][GATEWAY]["p50_ms"] == 43.0
    assert document["day"] == "2026-01-31" and all(document["aims"].values())


def test_write_page_replaces_the_measured_part_only(tmp_path):
    page = tmp_path / "serving.md"
    page.write_text(f"before\n{BEGIN}\nof last year\n{END}\nafter\n")
    written = report(GOOD).write_page(page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "of last year" not in text
    assert f"**{GATEWAY}**" in text and "```json\n{" in text
    for figure in written[1:]:
        assert figure.read_bytes().startswith(b"\x89PNG") and f"({figure.name})" in text
    report(GOOD).write_page(page)
    assert page.read_text() == text


def test_page_without_markers_is_not_written(tmp_path):
    page = tmp_path / "serving.md"
    page.write_text("mine")
    with pytest.raises(ValueError, match=BEGIN):
        report(GOOD).write_page(page)
    assert page.read_text() == "mine" and os.listdir(tmp_path) == ["serving.md"]


def test_form_contains_the_frame_unchanged(tmp_path):
    body = tmp_path / "frame.bin"
    body.write_bytes(b"\r\n--x\r\n")
    load = Target("it", 1, "/predict", (), form=True).load(body, {})
    assert b"\r\n\r\n\r\n--x\r\n\r\n--" in Path(load.body).read_bytes()
    assert load.headers["content-type"].startswith("multipart/form-data; boundary=")


def test_former_names_of_flags_and_values_work_with_a_warning(capsys):
    renamed = {"--patience": "--retries", "slept": "sleep"}
    arguments = ["--patience=2", "--models", "slept", "--rounds", "1"]
    assert replace_renamed(arguments, renamed) == ["--retries=2", "--models", "sleep", "--rounds", "1"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "--retries" in warnings[0] and "sleep" in warnings[1]
