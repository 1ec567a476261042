"""The simulated failure schedule, held to its first-order formula (Young 1974, Daly 2006)."""
import importlib.util
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "goodput.py"


@pytest.fixture(scope="module")
def module():
    import sys

    spec = importlib.util.spec_from_file_location("goodput", PATH)
    sys.modules["goodput"] = module = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_goodput(module):
    run = module.Run(ranks=16384, duration=54 * 86400, every=600, write=60, stall=1, teardown=5, restart=120, hang_share=0.05,
                     hang_timeout=600)
    found = [module.goodput(run, seed) for seed in range(50)]
    between = 1 / (module.LLAMA_3 * run.ranks)
    lost = run.stall / (run.every + run.stall)
    lost += (run.every / 2 + run.write + run.restart + 0.95 * run.teardown + 0.05 * run.hang_timeout) / between
    assert statistics.mean(share for share, _ in found) == pytest.approx(1 - lost, abs=3e-3)
    assert statistics.mean(failures for _, failures in found) == pytest.approx(run.duration / between, rel=0.1)
    assert min(module.goodput(replace(run, ranks=1024), seed)[0] for seed in range(50)) > 0.97
    assert module.goodput(replace(run, ranks=1, stall=0), 0) == (1, 0)
