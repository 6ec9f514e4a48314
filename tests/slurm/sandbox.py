"""A real Slurm on this machine: a controller and four nodes, each of them, as root, in namespaces of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

import support

NODES = ("node1", "node2", "node3", "node4")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "nsenter")
PR_SET_PDEATHSIG = 1
CONFIGURATION = """\
ClusterName=sandbox
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmdSpoolDir={root}/spool/%n
TmpFS=/tmp
StateSaveLocation={root}/state
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SlurmdTimeout=5
KillWait=3
MinJobAge=3600
MessageTimeout=5
BatchStartTimeout=10
CompleteWait=0
OverTimeLimit=0
JobRequeue=1
NodeName=node[1-4] NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports} CPUs=2 Sockets=1 CoresPerSocket=2 \
ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES DefaultTime=10 State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=node[1-2] DefaultTime=10 State=UP PriorityTier=10
PartitionName=side Nodes=node[3-4] DefaultTime=10 State=UP
"""

BUSY = 3  # these tests run beside others


class Sandbox:
    """The cluster; its daemons are children of this process and die with it, whatever ends it.

    Partitions: main (node1 and node2), urgent (the same nodes, preempts main), side (node3 and node4).

    Args:
        root: an empty folder for all that it writes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.namespaces = os.geteuid() == 0
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**_plain_environment(), "SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        """Starts all daemons and waits until the nodes are idle."""
        for name in ("munge", "state", "log", "run", *(f"spool/{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        (self.root / "munge").chmod(0o700 if os.geteuid() else 0o755)
        key = self.root / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = _free_ports(1 + len(NODES))
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        configuration = CONFIGURATION.format(
            root=self.root, user=user, controller=ports[0], ports=",".join(map(str, ports[1:]))
        )
        (self.root / "slurm.conf").write_text(configuration)
        munge = self.root / "munge"
        files = [f"--{what}={munge}/munge.{end}" for what, end in (("socket", "sock"), ("seed-file", "seed"))]
        files += [f"--pid-file={munge}/munged.pid", f"--log-file={munge}/munged.log", f"--key-file={key}"]
        self._spawn("munged", ["munged", "--foreground", "--force", *files])
        self.until(lambda: (munge / "munge.sock").exists(), 10, "munged's socket")
        self._spawn("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        self.until_idle(*NODES)

    def stop(self) -> None:
        """Kills everything."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()  # of a node's namespaces all that is in them, too
            daemon.wait()
        self._daemons.clear()

    # Nodes

    def start_node(self, node: str) -> None:
        """Starts a node's namespaces with its slurmd in them; without root only the slurmd."""
        slurmd = ["slurmd", "-D", "-N", node]
        if self.namespaces:
            # Its first process is a shell, so that slurmd can be killed alone.
            visible = "".join(f"mount --bind $T/{i} {path};" for i, path in enumerate(self._below_tmp()))
            keep = "".join(f"mkdir $T/{i}; mount --bind {path} $T/{i};" for i, path in enumerate(self._below_tmp()))
            script = (
                f"set -e; hostname {node}; T=/mnt; mount -t tmpfs tmpfs $T; {keep}"
                "mount -t tmpfs tmpfs /tmp; chmod 1777 /tmp;"
                f"mkdir -p {' '.join(map(str, self._below_tmp()))} /tmp; {visible} umount -R $T;"
                "mount -t tmpfs tmpfs /dev/shm; chmod 1777 /dev/shm;"
                f"{' '.join(slurmd)} & while :; do sleep 1 & wait $!; done"
            )
            flags = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
            slurmd = ["unshare", *flags, "sh", "-c", script]
        self._spawn(node, slurmd)

    def _below_tmp(self) -> list[Path]:
        """What must stay visible where a node has a /tmp of its own."""
        return [path for path in (self.root, support.ROOT) if path.is_relative_to("/tmp")]

    def kill_node(self, node: str) -> None:
        """The node's power fails."""
        daemon = self._daemons.pop(node)
        daemon.kill()  # with it go all processes of its namespaces
        daemon.wait()

    def kill_slurmd(self, node: str) -> None:
        """The node's slurmd dies; what runs there goes on."""
        for process in psutil.Process(self._daemons[node].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "slurmd":
                    process.kill()

    def restart_slurmd(self, node: str) -> None:
        """Starts slurmd again on a node that is up."""
        (shell,) = psutil.Process(self._daemons[node].pid).children()
        command = ["nsenter", "-t", str(shell.pid), "--all", "slurmd", "-D", "-N", node]
        self._spawn(f"{node}, second slurmd", command)

    # Commands

    def run(self, *command: str, check: bool = True, **variables: str) -> str:
        """Output of one of Slurm's commands."""
        environment = {**self.environment, **variables}
        result = subprocess.run(
            command, env=environment, cwd=support.ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
        return result.stdout.strip()

    def state(self, job: str) -> str:
        """A job's state, such as RUNNING; GONE once Slurm has forgotten it."""
        shown = self.run("scontrol", "-o", "show", "job", job, check=False)
        found = re.search(r"JobState=(\S+)", shown)
        return found[1] if found else "GONE"

    def restarts(self, job: str) -> int:
        """How often a job was queued again."""
        found = re.search(r"Restarts=(\d+)", self.run("scontrol", "-o", "show", "job", job))
        assert found is not None
        return int(found[1])

    def batch_host(self, job: str) -> str:
        """The node on which the job's script runs."""
        found = re.search(r"BatchHost=(\S+)", self.run("scontrol", "-o", "show", "job", job))
        assert found is not None
        return found[1]

    # Waiting

    def until(self, condition: Callable[[], object], seconds: float, what: str) -> float:
        """Polls, for `seconds` of a quiet machine; returns the seconds that it took.

        Raises:
            TimeoutError: it did not come true in time.
        """
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > BUSY * seconds:
                queue = self.run("squeue", check=False)
                raise TimeoutError(f"after {BUSY * seconds:.0f} s there is still not: {what}\n{queue}")
            time.sleep(0.1)
        return time.monotonic() - start

    def until_ended(self, job: str, seconds: float = 120) -> str:
        """Waits for a job's end; returns its last state."""
        under_way = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        self.until(lambda: self.state(job) not in under_way, seconds, f"the end of job {job}")
        return self.state(job)

    def until_idle(self, *nodes: str, seconds: float = 60) -> None:
        """Waits until the nodes can take a job."""

        def idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T", check=False).splitlines()
            return len(states) >= len(nodes) and all(line.endswith(" idle") for line in states)

        self.until(idle, seconds, f"{nodes} idle")

    def _spawn(self, name: str, command: list[str]) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip


def missing_programs() -> list[str]:
    """What is needed and not installed."""
    path = _plain_environment()["PATH"]
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def _plain_environment() -> dict[str, str]:
    """What a user's shell has, and what Open MPI needs for root."""
    kept = {name: os.environ[name] for name in ("HOME", "USER", "LANG", "PATH") if name in os.environ}
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    # More ranks wait here than there are cores; and all nodes have the same ones, so that nothing is bound.
    settings = {"OMPI_MCA_mpi_yield_when_idle": "1", "HPC_KFAC_MPIRUN_OPTIONS": "--map-by slot --bind-to none"}
    path = kept.get("PATH", "") + ":/usr/sbin:/sbin"
    return {**kept, "PATH": path, **dict.fromkeys(names, "1"), **settings}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
