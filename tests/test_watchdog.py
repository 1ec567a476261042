"""Ranks that die or hang, under no launcher: the others leave by themselves, with stacks and the exit code that says why."""
import os
import signal
import time

import pytest

from ranks import Group
from serpent_scale.errors import EXIT_HANG
from serpent_scale.parallel import watchdog


def a_function_that_hangs() -> None:
    time.sleep(1000)


def run(processes, folder, timeout: float, fault: str, victim: int) -> str:
    """Steps of 50 ms until the 20th, in which rank `victim` does as `fault` says; its stderr goes to `folder`.

    The ranks sleep rather than meet in a collective, as one of gloo's notices a dead rank itself."""
    os.dup2(os.open(folder / f"{processes.rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    watchdog.start(processes, timeout)
    for step in range(1, 400):
        watchdog.beat(f"step {step}")
        if step == 20:
            (folder / f"{processes.rank}.ready").write_text("")
            if fault == "farewell":
                break
            if processes.rank == victim and fault == "hang":
                a_function_that_hangs()
            if processes.rank == victim and fault == "failure":
                watchdog.stop(failed=True)
                time.sleep(1000)
        if step == 25 and fault in ("hang", "stop"):  # the others wait for it
            time.sleep(1000)
        time.sleep(0.05)
    watchdog.stop()
    time.sleep(1 + processes.rank)  # nobody takes the others' farewell for a death
    return "left"


def start(folder, timeout: float, fault: str, victim: int = 1) -> Group:
    group = Group(3, run, folder, timeout, fault, victim)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.ready"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return group


def wait(group: Group, ranks, seconds: float) -> list:
    """Exit codes of ranks that must end within so many seconds."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        group.ranks[rank].join(max(0, deadline - time.monotonic()))
    codes = [group.ranks[rank].exitcode for rank in ranks]
    group.kill()
    return codes


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_leave_when_a_rank_is_killed(tmp_path, victim):
    group = start(tmp_path, 60, "none")
    group.kill(victim)
    others = [rank for rank in range(3) if rank != victim]
    assert wait(group, others, 5) == [1, 1]
    for rank in others:
        assert f"watchdog: rank {victim} is dead; rank {rank}, at 'step " in (tmp_path / f"{rank}.err").read_text()


def test_a_hang_is_told_with_the_stacks_of_every_rank(tmp_path):
    group = start(tmp_path, 2, "hang")
    assert wait(group, (0, 1, 2), 2 + 10) == [EXIT_HANG] * 3
    for rank in range(3):
        text = (tmp_path / f"{rank}.err").read_text()
        assert f"watchdog: rank {rank} of 3 has been at 'step {20 if rank == 1 else 25}' for" in text
        assert "in run\n" in text and ("in a_function_that_hangs" in text) == (rank == 1)
        assert "rank 1 raised the alarm" in text and "no answer" not in text


def test_a_rank_that_cannot_answer_is_named(tmp_path):
    group = start(tmp_path, 2, "stop")
    os.kill(group.ranks[1].pid, signal.SIGSTOP)
    assert wait(group, (0, 2), 2 + 10) == [EXIT_HANG] * 2
    assert "no answer from ranks [1]: stopped, or stuck in a library" in (tmp_path / "0.err").read_text()


def test_a_farewell_is_no_death_and_a_failure_is(tmp_path):
    assert start(tmp_path, 60, "farewell").join(20) == ["left"] * 3
    (tmp_path / "second").mkdir()
    group = start(tmp_path / "second", 60, "failure")
    assert wait(group, (0, 2), 5) == [1, 1]
    assert "rank 1 is dead; rank 2" in (tmp_path / "second" / "2.err").read_text()
