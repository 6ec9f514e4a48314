"""What `hpc-kfac info` tells, and the two checks of a launch, each in a process of its own under a real MPI."""

from __future__ import annotations

import json
import os

import pytest
from mpi4py import MPI

import support
from hpc_kfac.cluster import environment, scheduler
from hpc_kfac.cluster.errors import LaunchError
from hpc_kfac.distributed import gpu_memory


@pytest.fixture
def plain(monkeypatch):
    """An environment without launcher or scheduler."""
    for name in (*scheduler.SCHEDULER_VARIABLES, "HPC_KFAC_RANKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_describe_is_json_and_true(plain):
    plain.setenv("SLURM_JOB_ID", "17")
    found = json.loads(json.dumps(environment.describe()))
    assert found["mpi"]["thread_level"] == "THREAD_MULTIPLE"
    assert found["mpi"]["ranks"] == MPI.COMM_WORLD.size == 1
    assert found["mpi"]["library"] in MPI.Get_library_version()
    assert found["horovod"]["mpi"] is True and found["horovod"]["gloo"] is False
    assert found["versions"]["mpi4py"] and found["versions"]["torch"].startswith("2.")
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["scheduler"] == {"SLURM_JOB_ID": "17"}


def test_report_names_everything(plain):
    text = environment.report()
    for line in ("python", "torch", "MPI thread level", "Horovod built with", "GPUs", "cores", "threads per rank"):
        assert f"\n{line}  " in text
    assert "mpi (without gloo, nccl" in text


def test_report_without_mpi4py_and_horovod(plain):
    plain.setattr(environment, "version", lambda package: None)
    text = environment.report()
    assert "mpi4py is not installed" in text and "torch" in text


def test_gpu_awareness_of_an_mpi_without_queries_is_told_from_its_settings(plain):
    plain.setattr(gpu_memory, "_loaded_mpi_libraries", lambda: [])
    assert gpu_memory.gpu_aware().startswith("unknown")
    plain.setenv("MPICH_GPU_SUPPORT_ENABLED", "1")
    assert gpu_memory.gpu_aware() == "MPICH_GPU_SUPPORT_ENABLED=1"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ("OMPI_COMM_WORLD_SIZE", 4)),
        ({"PMI_SIZE": "3", "SLURM_NTASKS": "5", "SLURM_STEP_ID": "0"}, ("PMI_SIZE", 3)),
        ({"SLURM_NTASKS": "4"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, ("SLURM_NTASKS", 4)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "3"}, ("SLURM_STEP_NUM_TASKS", 2)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": str(0xFFFFFFFA)}, None),
    ],
)
def test_launched_ranks(plain, variables, expected):
    for name, value in variables.items():
        plain.setenv(name, value)
    assert scheduler.launched_ranks() == expected


def test_singletons_of_srun_are_refused(plain):
    plain.setenv("SLURM_STEP_ID", "0")
    plain.setenv("SLURM_NTASKS", "4")
    message = r"SLURM_NTASKS=4, but MPI.COMM_WORLD has 1 rank.*srun --mpi=pmix"
    with pytest.raises(LaunchError, match=message):
        environment.check_launch()


def test_singletons_of_a_foreign_mpirun_are_refused(plain):
    plain.setenv("PMI_SIZE", "2")
    with pytest.raises(LaunchError, match=r"PMI_SIZE=2.*the mpirun that belongs to this MPI"):
        environment.check_launch()


def test_one_process_is_accepted(plain):
    environment.check_launch()
    plain.setenv("SLURM_NTASKS", "4")  # a shell in an allocation
    environment.check_launch()


def test_a_single_process_where_a_job_script_expects_more_is_refused(plain):
    plain.setenv("HPC_KFAC_RANKS", "4")
    with pytest.raises(LaunchError, match="HPC_KFAC_RANKS=4, but MPI.COMM_WORLD has 1 rank"):
        environment.check_launch()
    plain.setenv("HPC_KFAC_RANKS", "1")
    environment.check_launch()


@pytest.mark.ranks(2)
def test_another_number_of_ranks_than_expected_is_refused(comm, monkeypatch):
    monkeypatch.setenv("HPC_KFAC_RANKS", "3")
    with pytest.raises(LaunchError, match="HPC_KFAC_RANKS=3, but MPI.COMM_WORLD has 2 ranks"):
        environment.check_launch()
    monkeypatch.setenv("HPC_KFAC_RANKS", "2")
    environment.check_launch()


@pytest.mark.ranks(2, 3)
def test_ranks_of_mpirun_are_accepted(comm, mpi_ranks, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")  # mpirun inside a step
    monkeypatch.setenv("SLURM_NTASKS", "7")
    environment.check_launch()
    environment.check_threads()
    assert environment.describe()["mpi"]["ranks"] == mpi_ranks


def test_low_thread_level_is_refused(tmp_path):
    program = tmp_path / "low.py"
    program.write_text(
        "import mpi4py\nmpi4py.rc.thread_level = 'serialized'\nfrom hpc_kfac.cluster import environment, errors\n"
        "try:\n    environment.check_threads()\nexcept errors.LaunchError as error:\n    print('refused:', error)"
    )
    result = support.run_mpi(program, ranks=1)
    assert result.rc == 0, result.output
    assert "refused: MPI's thread level is THREAD_SERIALIZED" in result.stdout
