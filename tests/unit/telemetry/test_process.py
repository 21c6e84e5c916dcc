"""The process's numbers, from a /proc of files and from the real one."""

import os
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sidecar.telemetry import process
from sidecar.telemetry.metrics import Registry


def read(registry: Registry) -> dict[str, float]:
    text = b"".join(registry.render()).decode()
    return {sample.name: sample.value for family in parse_text(text) for sample in family.samples}


def test_fields_are_read_where_proc_5_puts_them(tmp_path: Path) -> None:
    own = tmp_path / "self"
    (own / "fd").mkdir(parents=True)
    for number in range(3):
        (own / "fd" / str(number)).touch()
    fields = [str(number) for number in range(4, 53)]
    fields[22 - 4] = str(50 * os.sysconf("SC_CLK_TCK"))
    (own / "stat").write_text(f"42 (a) (b c) S {' '.join(fields)}\n")
    (own / "statm").write_text("100 20 3 4 0 5 0\n")
    (own / "limits").write_text("Limit  Soft Limit\nMax open files            1024     4096     files\n")
    (tmp_path / "stat").write_text("cpu 1 2 3\nbtime 1700000000\n")
    registry = Registry(lambda: 0.0)
    process.register(registry, tmp_path)
    numbers = read(registry)
    page = os.sysconf("SC_PAGE_SIZE")
    assert numbers["process_start_time_seconds"] == 1700000050
    assert numbers["process_resident_memory_bytes"] == 20 * page
    assert numbers["process_virtual_memory_bytes"] == 100 * page
    assert numbers["process_open_fds"] == 3
    assert numbers["process_max_fds"] == 1024
    assert numbers["process_cpu_seconds_total"] > 0


def test_without_proc_only_the_cpu_time_is_given(tmp_path: Path) -> None:
    registry = Registry(lambda: 0.0)
    process.register(registry, tmp_path)
    assert [name for name in read(registry) if name.startswith("process")] == ["process_cpu_seconds_total"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_the_real_proc_can_be_read() -> None:
    registry = Registry(lambda: 0.0)
    process.register(registry)
    numbers = read(registry)
    assert numbers["pillion_scrape_errors_total"] == 0
    assert numbers["process_resident_memory_bytes"] > 1e6
    assert numbers["process_open_fds"] >= 3
