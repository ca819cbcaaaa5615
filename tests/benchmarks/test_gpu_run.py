"""The command of benchmarks/gpu: it keeps what it has, goes on after failures, and runs to its end anywhere."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks" / "gpu" / "run.py"


@pytest.fixture
def run(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(RUN.parent))
    monkeypatch.syspath_prepend(str(RUN.parents[1]))
    import run

    return run


@pytest.fixture
def results(run, tmp_path):
    return run.Results(tmp_path, {"device": "cpu"})


def on_disk(results):
    return json.loads(results.file.read_text())["items"]


def test_a_failure_is_recorded_and_the_run_goes_on(run, results, monkeypatch):
    def broken(context):
        yield {"a": 1}
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(
        run, "ITEMS", (("broken", broken, 1.0), ("fine", lambda context: iter([{"met": False}, {}]), 1.0))
    )
    run.run_items(results, None, [], time.monotonic() + 100)
    found = on_disk(results)
    assert found["broken"]["status"] == "failed: RuntimeError: no memory"
    assert found["broken"]["rows"] == [{"a": 1}]
    assert found["fine"]["status"] == "done, 1 rows failed or short of their target"


def test_every_row_is_on_disk_before_the_next(run, results, monkeypatch):
    def rows(context):
        yield {"row": 1}
        assert on_disk(results)["item"]["rows"] == [{"row": 1}]
        assert on_disk(results)["item"]["status"] == "cut short"
        yield {"row": 2}

    monkeypatch.setattr(run, "ITEMS", (("item", rows, 1.0),))
    run.run_items(results, None, [], time.monotonic() + 100)
    assert on_disk(results)["item"]["status"] == "done"
    assert len(on_disk(results)["item"]["rows"]) == 2


def test_time_is_kept(run, results, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])

    def slow(context):
        for row in range(10):
            clock[0] += 30
            yield {"row": row}

    monkeypatch.setattr(run, "ITEMS", (("slow", slow, 0.5), ("slower", slow, 1.0), ("late", slow, 1.0)))
    run.run_items(results, None, [], 180.0)
    found = on_disk(results)
    assert [len(found[name]["rows"]) for name in ("slow", "slower", "late")] == [4, 3, 0]
    assert found["slow"]["status"].startswith("stopped at its share of the time")
    assert found["late"]["status"] == "skipped: no time left"
    assert clock[0] <= 180 + 30


def test_the_table_tells_every_row_and_status(run, results):
    record = results.start("item")
    record |= {"status": "done", "seconds": 1.0, "rows": [{"us": 2.5, "met": True}, {"failed": "a|b"}]}
    text = results.table().read_text()
    assert "## item" in text
    assert "| us | met | failed |" in text
    assert "| 2.5 | True |  |" in text
    assert "a/b" in text


def test_every_benchmark_of_the_list_names_an_item_or_says_that_none_runs_it(run):
    text = (RUN.parent / "README.md").read_text()
    names = {name for name, _, _ in run.ITEMS}
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith(("|---", "| check", "| benchmark"))
    ]
    named = set()
    for line in rows:
        item = line.replace("\\|", "").split("|")[3].strip().strip("`")
        assert item in {*names, "yardstick", "tests", "none"}, line
        named.add(item)
    assert names <= named


@pytest.mark.slow
def test_it_runs_to_its_end_on_a_cpu(tmp_path):
    done = subprocess.run(
        [sys.executable, RUN, "--tiny", "--minutes", "30", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["setting"]["tiny"] is True
    for name, record in found["items"].items():
        assert record["status"].startswith("done"), (name, record)
        assert record["rows"]
        assert not [row for row in record["rows"] if "failed" in row], name
    assert len(found["items"]) == 12
    wrong = [row for row in found["items"]["correctness"]["rows"] if not row["met"]]
    assert not wrong
    assert found["items"]["model_outputs"]["rows"][0]["greedy_tokens_equal"]
    assert "## decode_70b" in (tmp_path / "cpu.md").read_text()
