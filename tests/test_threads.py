"""Threads: what affinity and quotas allow, what other processes hold, and what a resume keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import robudget as rb
from robudget import threads
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Store


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of this test's processes alone, and no OMP_NUM_THREADS, which would settle the number."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS")


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, float("inf")),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, float("inf")),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            {  # a group has no more than the groups around it
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "250000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/job\n",
                f"{V1}/job/cpu.cfs_quota_us": "150000\n",
                f"{V1}/job/cpu.cfs_period_us": "50000\n",
            },
            3.0,
        ),
        (
            {  # in a container the path is the host's, and the mount's root is the group
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/0123\n",
                f"{V1}/cpu.cfs_quota_us": "100000\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            1.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                f"{V1}/cpu.cfs_quota_us": "-1\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            float("inf"),
        ),
    ],
)
def test_the_quota_of_control_groups(files: dict[str, str], cpus: float, tmp_path: Path) -> None:
    root = tree(tmp_path / "root", files)
    assert threads.quota(root) == cpus
    assert threads.cores(root) == max(1, int(min(cpus, len(os.sched_getaffinity(0)))))


@pytest.mark.parametrize(
    ("held", "available", "expected"),
    [([], 8, 8), ([2], 8, 6), ([8], 8, 4), ([8, 4], 8, 2), ([2], 2, 1), ([1, 1, 1], 2, 1), ([4], 1, 1)],
)
def test_a_share_is_what_others_leave_or_an_equal_part(held: list[int], available: int, expected: int) -> None:
    assert threads.share(held, available) == expected


HOLDER = """
import sys
from robudget import threads
with threads.claimed(int(sys.argv[1])):
    print(threads.held_by_others(), flush=True)
    sys.stdin.readline()
"""


def holder(count: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "[]"
    return process


def test_processes_know_of_each_other_and_of_no_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert threads.held_by_others() == []
    other = holder(3)
    try:
        assert threads.held_by_others() == [3]
        with threads.claimed(0) as count:
            assert count == 2
            assert threads.held_by_others() == [3], "its own claim is not another's"
        with threads.claimed(4) as count:
            assert count == 4, "what the user asks for"
    finally:
        other.kill()
        other.wait()
    assert threads.held_by_others() == []
    with threads.claimed(0) as count:
        assert count == 4
    assert not list(threads._folder().glob("*.lease"))


def test_a_sweep_holds_the_threads_of_its_workers_which_hold_none_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 5)
    code = (
        "from robudget import threads\nthreads.cores = lambda: 5\nprint(threads.held_by_others())\n"
        "print(threads.taken_for(1, 0)[0])\nprint(threads.held_by_others())"
    )

    def seen(**environment: str) -> list[str]:
        words = [sys.executable, "-c", code]
        return subprocess.check_output(words, env=os.environ | environment, text=True).splitlines()

    each, lease = threads.taken_for(2, 0)
    assert each == 2
    assert lease is not None
    name = Path(lease.lock_file).name
    assert seen() == ["[4]", "2", "[4]"]
    assert seen(**{threads.LEASE: name}) == ["[]", "5", "[]"], "its own worker takes it for no other"
    with monkeypatch.context() as patch:
        patch.setenv(threads.LEASE, name)
        with threads.claimed(2):
            assert [path.name for path in threads._folder().glob(f"{os.getpid()}-*.lease")] == [name]
    threads.give_back(lease)
    assert seen() == ["[]", "5", "[]"]
    assert threads.taken_for(2, 3)[0] == 3, "what the user asks for"


def test_work_that_was_begun_keeps_its_number_where_the_machine_has_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 4)
    before = torch.get_num_threads()
    other = holder(4)
    try:
        with threads.claimed(0, begun_with=3) as count:
            assert (count, torch.get_num_threads()) == (3, 3)
        with threads.claimed(1, begun_with=3) as count:
            assert count == 1
        with threads.claimed(0, begun_with=64) as count:
            assert count <= 4
    finally:
        other.kill()
        other.wait()
    assert torch.get_num_threads() == before


@pytest.mark.skipif(threads.cores() < 2, reason="needs two CPUs")
def test_a_run_goes_on_with_the_number_it_began_with(tiny: rb.Recipe, tmp_path: Path) -> None:
    """Stopped under two threads, it is not refused by a process that would take one, and stays at two."""

    class Stop(Exception):
        pass

    def stop(progress: object) -> None:
        raise Stop

    torch.set_num_threads(1)
    recipe = tiny.with_({"epochs": 3})
    with pytest.raises(Stop):
        rb.run(recipe, store=tmp_path / "runs", site=Site(device="cpu", threads=2), progress=stop)
    folder = Store(tmp_path / "runs").folder(recipe)
    assert folder.threads == 2
    assert not folder.done
    result = rb.run(recipe, store=tmp_path / "runs", site=Site(device="cpu"))
    assert result.folder.record()["environment"]["threads"] == 2
    assert torch.get_num_threads() == 1


def waiting(**environment: str) -> dict[str, str]:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    code = f"import json, os, robudget; print(json.dumps({{k: os.environ[k] for k in {names} if k in os.environ}}))"
    clean = {k: v for k, v in os.environ.items() if k not in names}
    run = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    return dict(json.loads(run.stdout))


def test_threads_wait_asleep_beside_others_and_as_the_user_says() -> None:
    alone = waiting()
    whole = threads.cores() == os.cpu_count()
    assert alone == ({"GOMP_SPINCOUNT": threads.SPIN_TURNS} if whole else {"OMP_WAIT_POLICY": "PASSIVE"})
    other = holder(1)
    try:
        assert waiting() == {"OMP_WAIT_POLICY": "PASSIVE"}
        assert waiting(OMP_WAIT_POLICY="ACTIVE") == {"OMP_WAIT_POLICY": "ACTIVE"}
    finally:
        other.kill()
        other.wait()


def test_two_sweeps_at_once_take_at_most_half_as_much_work_again_as_one_after_the_other(
    tiny: Recipe, tmp_path: Path
) -> None:
    """CPU seconds of the processes, with as many threads as they choose: threads that wait must not turn in circles."""
    # Two threads each, spinning as they do by default, take 6.6 times the work of one after the other with this recipe,
    # and with a smaller one now and then no more (bench/RESULTS.md).
    recipe = tiny.with_(
        {"epochs": 6, "model.base": 8, "batch_size": 128, "validation.images": 8, "evaluation.images": 4}
    )
    chosen = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_"))}

    def start(seed: int) -> subprocess.Popen[bytes]:
        path = tmp_path / f"{seed}.yaml"
        path.write_text(json.dumps({"base": recipe.to_dict(), "axes": {"seed": {str(seed): {"seed": seed}}}}))
        words = ["sweep", str(path), "device=cpu", "--workers", "1", "--store", str(tmp_path / str(seed))]
        return subprocess.Popen([sys.executable, "-m", "robudget", *words], env=chosen, stdout=subprocess.DEVNULL)

    def work(*processes: subprocess.Popen[bytes]) -> float:
        used = 0.0
        for process in processes:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0
            used += usage.ru_utime + usage.ru_stime
        return used

    alone = work(start(0))
    together = work(start(1), start(2))
    assert together <= 1.5 * 2 * alone
