"""The table of several GPUs: measured on two CPU ranks, cut, continued, reported; a cell that fails is one line of it."""
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scaling():
    patch = pytest.MonkeyPatch()
    patch.setenv("DS_ACCELERATOR", "cpu")
    patch.syspath_prepend(BENCHMARKS)  # ranks get this path too
    import scaling

    yield scaling
    patch.undo()


def outcome(ranks, name: str) -> dict:
    if name == "fails" and ranks.rank == 1:
        raise ValueError("told")
    if name == "hangs":
        time.sleep(60)
    dist.barrier()
    return {"losses": [ranks.world_size, 1.0]}


class Plan:
    """Cells whose measurement is `outcome`."""

    def __init__(self, cells, run_ranks):
        self.cells, self.run_ranks, self.measured = cells, run_ranks, []

    def measure(self, cell, seconds):
        self.measured.append(cell.name)
        return self.run_ranks(cell.ranks, outcome, cell.name, seconds=min(seconds, 2) if cell.name == "hangs" else seconds)

    def forget(self, cell):
        pass


def test_cells_that_fail(scaling, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(scaling, "LIMIT", 60.0)
    cells = [scaling.Cell(name, "losses", 2, None) for name in ("fails", "hangs", "is fine", "too late")]
    plan = Plan(cells, scaling.harness.run_ranks)
    path = tmp_path / "found.jsonl"
    results = scaling.Results(path, {"ranks": 2})
    assert scaling.run(plan, cells[:3], results, time.monotonic() + 100) == []
    assert scaling.run(plan, cells, results, time.monotonic() + 1) == cells[3:] and "too late" not in plan.measured
    results.file.write('{"cell": "too la')  # killed here
    results.file.close()
    found = scaling.Results(path, {"ranks": 2}).found
    assert found["fails"]["failed"] == "ValueError: told"
    assert found["hangs"]["failed"] == "not done after 2 s"
    assert found["is fine"]["losses"] == [2, 1.0] and len(found) == 3
    monkeypatch.setattr(scaling, "LIMIT", 100.0)
    late = scaling.Cell("hangs", "losses", 2, None)
    monkeypatch.setattr(scaling, "LEAST", 0.0)
    assert scaling.run(plan, [late], scaling.Results(tmp_path / "other", {}), time.monotonic() + 1) == [late], "cut, not failed"
    assert scaling.run(plan, cells[:3], scaling.Results(path, {"ranks": 2}), 0.0) == []
    assert scaling.run(plan, cells[:3], scaling.Results(path, {"ranks": 2}), 0.0, again=True) == cells[:2]
    with pytest.raises(scaling.UserError, match="line 1 says .*'ranks': 2.* name another file"):
        scaling.Results(path, {"ranks": 4})


def test_table(scaling, tmp_path, monkeypatch, capsys):
    table = replace(scaling.SMALL, lengths=(256,), loss_length=64, loss_steps=3, warmup=1, steps=1, recompute=64)
    monkeypatch.setattr(scaling, "SMALL", table)
    monkeypatch.setitem(sys.modules["step"].SIZES, "tiny", (32, 2))
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "scaling.py")])
    path, report = tmp_path / "found.jsonl", tmp_path / "report.md"
    asked = ["--small", "--ranks", "2", "--resume", str(path), "--append", str(report), "--commit", "this one"]
    only = "links|tiny mamba (x1|ZeRO-1)|losses.*2$|losses.*2x1$|sequence.*(x2|mamba)"
    scaling.main([*asked, "--minutes", "2", "--only", only])
    text, cells = report.read_text(), scaling.Plan(table, 2, tmp_path / "found.jsonl.work").cells
    found = scaling.Results(path, scaling.about(2, True)).found
    assert "Failed" not in text and "Not run" not in text, text
    assert len(found) == 9 and not (tmp_path / "found.jsonl.work").exists()

    saved, resumed = found["tiny mamba ZeRO-1 x2"], found["tiny mamba ZeRO-1 x2 resumed on 1"]
    assert resumed["step"] == 2 and resumed["next_loss"] == pytest.approx(saved["next_loss"], abs=1e-4) != saved["losses"][-1]
    assert saved["save_bytes"] > 12 * 30000
    alone, together = found["tiny mamba x1"]["ms"]["median"], saved["ms"]["median"]
    assert re.search(rf"\| 1 \| 2 \| {512e3 / together:,.0f} \| {together:.1f} \(.*\) \| {alone / together:.1%} \|", text)

    plain, mesh = found["losses tiny alternating 2x1"], found["losses tiny alternating 1x2"]
    assert mesh["digest"] == plain["digest"]
    assert mesh["losses"] == pytest.approx(plain["losses"], abs=1e-3) and len(set(mesh["losses"])) == 3

    for pattern in ("mamba", "alternating"):  # the formula counts what is sent
        cell = next(c for c in cells if c.name == f"sequence tiny {pattern} 256 x2")
        predicted = scaling.predict(cell.config, 100.0, 1e-3, 1e9)
        assert (found[cell.name]["exchanges"], found[cell.name]["bytes"]) == (predicted.exchanges, predicted.bytes)
        assert predicted.exchanges == 12 and predicted.ms > 112

    scaling.main([*asked, "--minutes", "0"])
    assert "Not run: tiny alternating x1, " in report.read_text() and path.read_text().count("\n") == 10


def test_links(scaling):
    for found in run_ranks(2, scaling.links, 1 << 12):
        assert 0 < found["latency"] < 1 and found["bandwidth"] > 0


def test_losses_judged(scaling, tmp_path):
    cells = [cell for cell in scaling.Plan(scaling.SMALL, 4, tmp_path).cells if cell.part == "losses"]
    assert [cell.name.split(maxsplit=3)[3] for cell in cells] == ["4x1", "4x1 in halves", "2x2"]
    assert [(cell.config.parallel.sequence, cell.config.grad_accumulation(4)) for cell in cells] == [(1, 1), (1, 2), (2, 1)]

    def judged(apart: float, digest: str) -> str:
        losses = [("4x1", [6.0, 5.0], "a"), ("4x1 in halves", [6.0, 5.001], "a"), ("2x2", [6.0, 5.0 + apart], digest)]
        found = {f"losses tiny alternating {name}": {"losses": values, "digest": d} for name, values, d in losses}
        return scaling.Report(cells, found).losses().splitlines()[-1]

    assert judged(0.0029, "a").endswith("| the same | yes |")
    assert judged(0.0031, "a").endswith("| the same | no |")
    assert judged(0.0, "b").endswith("| others | no |")
    assert judged(float("nan"), "a").endswith("| the same | no |")
