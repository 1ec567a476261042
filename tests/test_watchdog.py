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
    """Steps of 50 ms until the 10th, in which rank `victim` does as `fault` says; its stderr goes to `folder`.

    The ranks sleep rather than meet in a collective, as one of gloo's notices a dead rank itself."""
    os.dup2(os.open(folder / f"{processes.rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    watchdog.start(processes, timeout)
    for step in range(1, 400):
        watchdog.beat(f"step {step}")
        if step == 10:
            (folder / f"{processes.rank}.ready").write_text("")
            if fault == "farewell":
                break
            if processes.rank == victim and fault == "hang":
                a_function_that_hangs()
            if processes.rank == victim and fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if processes.rank == victim and fault == "failure":
                watchdog.stop(failed=True)
                time.sleep(1000)
        if step == 15 and fault in ("hang", "stop"):  # the others wait for it
            time.sleep(1000)
        time.sleep(0.05)
    watchdog.stop()
    time.sleep(1 + processes.rank)  # nobody takes the others' farewell for a death
    return "left"


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """By the fault and its rank: three ranks that it has come to, and their folder. All at once, as most of it is waiting."""
    started = {}
    for fault, victim in (("none", 0), ("none", 1), ("hang", 1), ("stop", 1), ("farewell", 1), ("failure", 1)):
        folder = tmp_path_factory.mktemp(fault)
        started[fault, victim] = Group(3, run, folder, 2 if fault in ("hang", "stop") else 60, fault, victim), folder

    def ready(fault: str, victim: int = 1):
        group, folder = started[fault, victim]
        deadline = time.monotonic() + 60
        while len(list(folder.glob("*.ready"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return group, folder

    yield ready
    for group, _ in started.values():
        group.kill()


def codes(group: Group, ranks) -> list:
    """Exit codes of ranks that must end."""
    for rank in ranks:
        group.ranks[rank].join(30)
    found = [group.ranks[rank].exitcode for rank in ranks]
    group.kill()
    return found


def seconds(folder, ranks) -> float:
    """From the fault to the last words of these ranks."""
    when = lambda names: max((folder / name).stat().st_mtime for name in names)
    return when(f"{rank}.err" for rank in ranks) - when(f"{rank}.ready" for rank in range(3))


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_leave_when_a_rank_is_killed(groups, victim):
    group, folder = groups("none", victim)
    killed = time.time()
    group.kill(victim)
    others = [rank for rank in range(3) if rank != victim]
    assert codes(group, others) == [1, 1]
    for rank in others:
        assert f"watchdog: rank {victim} is dead; rank {rank}, at 'step " in (folder / f"{rank}.err").read_text()
        assert (folder / f"{rank}.err").stat().st_mtime - killed < 5


def test_a_hang_is_told_with_the_stacks_of_every_rank(groups):
    group, folder = groups("hang")
    assert codes(group, (0, 1, 2)) == [EXIT_HANG] * 3 and seconds(folder, (0, 1, 2)) < 2 + 10
    for rank in range(3):
        text = (folder / f"{rank}.err").read_text()
        assert f"watchdog: rank {rank} of 3 has been at 'step {10 if rank == 1 else 15}' for" in text
        assert "in run\n" in text and ("in a_function_that_hangs" in text) == (rank == 1)
        assert "rank 1 raised the alarm" in text and "no answer" not in text


def test_a_rank_that_cannot_answer_is_named(groups):
    group, folder = groups("stop")
    assert codes(group, (0, 2)) == [EXIT_HANG] * 2 and seconds(folder, (0, 2)) < 2 + 10
    assert "no answer from ranks [1]: stopped, or stuck in a library" in (folder / "0.err").read_text()


def test_a_farewell_is_no_death_and_a_failure_is(groups):
    assert groups("farewell")[0].join(20) == ["left"] * 3
    group, folder = groups("failure")
    assert codes(group, (0, 2)) == [1, 1] and seconds(folder, (0, 2)) < 5
    assert "rank 1 is dead; rank 2" in (folder / "2.err").read_text()
