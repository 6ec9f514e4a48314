"""`run_mpi` returns how a program ended, whatever happens to it."""

from __future__ import annotations

import psutil
import pytest

import support


@pytest.fixture
def script(tmp_path):
    def write(text: str):
        path = tmp_path / "program.py"
        path.write_text("import sys\nfrom mpi4py import MPI\ncomm = MPI.COMM_WORLD\n" + text)
        return path

    return write


def test_output_and_status(script, tmp_path):
    program = script("print('rank', comm.rank, 'of', comm.size)\nsys.stderr.write(__import__('os').environ['EXTRA'])")
    result = support.run_mpi(program, ranks=3, env={"EXTRA": "from the caller"}, cwd=tmp_path)
    assert result.rc == 0 and not result.timed_out
    assert sorted(result.stdout.split("\n")[:3]) == [f"rank {r} of 3" for r in range(3)]
    assert result.stderr.count("from the caller") == 3


def test_exception_on_one_rank_ends_all(script):
    result = support.run_mpi(script("assert comm.rank == 0, 'rank one'\ncomm.Barrier()"))
    assert result.rc not in (0, -1)
    assert result.output.count("AssertionError: rank one") == 1


def test_hang_is_killed_with_all_ranks(script, tmp_path):
    program = script(
        "with open(f'{sys.argv[1]}/{comm.rank}', 'w') as file: file.write(str(__import__('os').getpid()))\ncomm.recv()"
    )
    files = [tmp_path / str(rank) for rank in range(2)]
    all_written = lambda: all(file.exists() and file.read_text() for file in files)  # noqa: E731
    result = support.run_mpi([str(program), str(tmp_path)], timeout=all_written)
    assert result.timed_out and result.rc == -1
    pids = [int(file.read_text()) for file in files]
    assert not any(psutil.pid_exists(pid) and "program.py" in " ".join(psutil.Process(pid).cmdline()) for pid in pids)


def test_time_in_seconds(tmp_path):
    result = support.run(["sleep", "60"], 1, {}, tmp_path)
    assert result.timed_out and result.rc == -1 and 1 <= result.seconds < 30


def test_missing_mpirun_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="env/install.sh"):
        support.mpirun()
