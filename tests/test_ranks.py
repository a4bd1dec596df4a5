"""How the tests' ranks start and end: forks of a server that behave as torchrun's processes do."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.ranks import ROOT, StartedRanks, rank_environment, run_ranks


def said(directory: Path, rank: int, num_ranks: int) -> list[str]:
    return (directory / f"rank_{rank}_of_{num_ranks}.log").read_text().split()


def pids(directory: Path, num_ranks: int) -> list[int]:
    """Ids of the ranks and of the process that each has started, as soon as all are at work."""
    files = [directory / f"{of}_{rank}" for of in ("pid", "helper") for rank in range(num_ranks)]
    end = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < end
        time.sleep(0.01)
    return [int(file.read_text()) for file in files]


def runs(process: int) -> bool:
    """Whether it is there, and not only waits for a parent to ask how it ended."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(processes: list[int]) -> None:
    end = time.monotonic() + 20
    while any(map(runs, processes)):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_rank_has_its_own_environment_and_log(tmp_path: Path) -> None:
    run_ranks("failing", [{str(rank): "end" for rank in range(3)}], 3, tmp_path)
    ranks = [said(tmp_path, rank, 3) for rank in range(3)]
    assert [rank[:5] for rank in ranks] == [[str(r), str(r), "3", "1", "unset"] for r in range(3)]
    assert [rank[6] for rank in ranks] == ["True"] * 3, "torch is there before the rank"
    assert ranks[0][5] != ranks[1][5], "sets have the same order in ranks that talk to each other"


def test_variables_are_there_before_the_imports(tmp_path: Path) -> None:
    run_ranks("failing", [{"0": "end"}], 1, tmp_path, environment={"OF_A_TEST": "yes"})
    *_, variable, _, imported = said(tmp_path, 0, 1)
    assert (variable, imported) == ("yes", "False")


@pytest.mark.parametrize(("how", "code"), [("fail", "1"), ("die", "-9")])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_fails_all(tmp_path: Path, how: str, code: str, failing: int) -> None:
    codes = ["None", "None", "None"]
    codes[failing] = code
    with pytest.raises(AssertionError) as error:
        run_ranks("failing", [{str(failing): how}], 3, tmp_path)
    assert f"failing on 3 ranks: exit codes [{', '.join(codes)}]" in str(error.value)
    if how == "fail":
        assert f"ValueError: rank {failing} cannot" in str(error.value)
    assert_gone(pids(tmp_path, 3))


def test_ranks_can_be_killed(tmp_path: Path) -> None:
    with StartedRanks("failing", [{}], 2, tmp_path) as ranks:
        processes = pids(tmp_path, 2)
        assert ranks.poll()
        ranks.kill()
        assert not ranks.poll()
    assert_gone(processes)


def test_nothing_outlives_a_killed_pytest(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.helpers.ranks import run_ranks\n"
        "run_ranks('failing', [{}], 2, Path(sys.argv[1]), environment={})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=rank_environment()
    )
    processes = pids(tmp_path, 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert {*processes} < {child.pid for child in children}
    processes = [child.pid for child in children]
    assert len(processes) == 5, "two ranks, the process of each, and the ranks' server"
    assert_gone(processes)
