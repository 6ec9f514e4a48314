"""Job scripts: the templates of jobs/, filled in for a site and a run, and handed to the scheduler."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.scheduler import parse_duration

CHECKOUT = Path(__file__).resolve().parents[2]
SITE = re.compile(r"^site=.*$", re.M)
RUN = re.compile(r"^\[ \$# -gt 0 \] \|\| set -- .*$", re.M)
"""Lines of a template that say where it runs, and what if it is called without arguments."""
GPUS = "{gpus_per_node}"
PATIENCE = 60.0  # seconds for the scheduler to take a job
OWN = ("--name", "--resume")
"""Settings that the job script gives the trainer itself, so that a job that starts again finds its run."""


@dataclass(frozen=True)
class Scheduler:
    """How a scheduler is spoken to.

    Attributes:
        template: in jobs/.
        mark: what its directives begin with.
        command: that takes a script.
        from_stdin: whether it reads the script from there.
        answer: pattern of what it says to a job; its group is the id.
        cancel: what ends a job.
        output: where its template lets a job print to.
    """

    template: str
    mark: str
    command: tuple[str, ...]
    from_stdin: bool
    answer: str
    cancel: str
    output: str


SCHEDULERS = {
    "slurm": Scheduler(
        "slurm/train.sbatch", "#SBATCH", ("sbatch", "--parsable"), False, r"^(\d+)", "scancel", "logs/{name}-{job}.out"
    ),
    "pbs": Scheduler("pbs/train.pbs", "#PBS", ("qsub",), False, r"^(\d+\S*)", "qdel", "logs/{job}.OU"),
    "lsf": Scheduler("lsf/train.lsf", "#BSUB", ("bsub",), True, r"Job <(\d+)>", "bkill", "logs/{job}.out"),
}
SHORT = {
    **{"-A": "--account", "-C": "--constraint", "-c": "--cpus-per-task", "-J": "--job-name", "-N": "--nodes"},
    **{"-n": "--ntasks", "-p": "--partition", "-q": "--qos", "-t": "--time", "-G": "--gpus", "-S": "--core-spec"},
}
"""Slurm's short options."""
SEVERAL = {"pbs": ("-l", "-W"), "lsf": ("-R",)}
"""Options that come several times: -l select=... and -l walltime=..., -R "span[...]" and -R "affinity[...]"."""


@dataclass(frozen=True)
class Site:
    """What a site's file says to `hpc-kfac submit`, in its comment lines.

    Attributes:
        name: of the file.
        scheduler: from ``# scheduler: NAME``.
        defaults: options of submit, from ``# default: --ranks-per-node 4``.
        directives: for the scheduler, from ``# directive: ...``; {nodes}, {gpus_per_node} and so on are filled in.
    """

    name: str
    scheduler: str
    defaults: tuple[str, ...]
    directives: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """What is asked of the scheduler.

    Attributes:
        name: of the job.
        run: the run file and arguments for the trainer.
        nodes: how many.
        ranks_per_node: on each.
        cpus_per_rank: cores of a rank.
        seconds: time limit.
        gpus_per_node: None for what the site's directives say.
        account: to charge.
        partition: or queue.
        goes_on_with: name of an earlier run to go on with.
    """

    name: str
    run: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    cpus_per_rank: int
    seconds: float
    gpus_per_node: int | None = None
    account: str | None = None
    partition: str | None = None
    goes_on_with: str | None = None


def read_site(folder: Path, name: str) -> Site:
    """Reads a site's file.

    Raises:
        InputError: there is none of that name, or it names no scheduler that is known.
    """
    path = folder / f"{name}.sh"
    sites = sorted(entry.stem for entry in folder.glob("*.sh"))
    if name not in sites:
        raise InputError(
            f"there is no site {name!r} in {folder}; choose one of {', '.join(sites)}, or add a file there"
        )
    text = path.read_text()

    def said(word: str) -> tuple[str, ...]:
        return tuple(line.strip() for line in re.findall(rf"^# {word}:(.*)$", text, re.M))

    scheduler = (*said("scheduler"), "slurm")[0]
    if scheduler not in SCHEDULERS:
        raise InputError(f"{path}: its scheduler is {scheduler!r}; it must be one of {', '.join(SCHEDULERS)}")
    defaults = tuple(word for line in said("default") for word in shlex.split(line))
    return Site(name, scheduler, defaults, said("directive"))


def render(template: str, site: Site, job: Job) -> str:
    """A job script: the template with its directives replaced, and new ones added below the last.

    Args:
        template: text of the scheduler's template.
        site: where it is to run; its directives win over the template's, those of the job over both.
        job: what is asked for.

    Raises:
        InputError: the template lacks a line that must be filled in.
    """
    scheduler = SCHEDULERS[site.scheduler]
    if not SITE.search(template) or not RUN.search(template):
        raise InputError(
            f"jobs/{scheduler.template} lacks a line that is filled in: 'site=...' or '[ $# -gt 0 ] || set -- ...'"
        )
    directives = [*_asked(site.scheduler, job, site), *_filled(site, job), *_named(site.scheduler, job)]
    wanted = {_key(site.scheduler, directive): directive for directive in directives}
    head: list[str] = []
    body: list[str] = []
    for line in template.splitlines():
        if line.startswith(scheduler.mark + " "):
            directive = line.removeprefix(scheduler.mark).strip()
            key = _key(site.scheduler, directive)
            head += [*body, f"{scheduler.mark} {wanted.pop(key)}" if key in wanted else line]
            body = []
        else:
            body.append(line)
    head += [f"{scheduler.mark} {directive}" for directive in wanted.values()]
    text = "\n".join([*head, *body]) + "\n"
    run = f"set -- {shlex.join(job.run)}"
    if job.goes_on_with is not None:
        run = f"export HPC_KFAC_NAME={shlex.quote(job.goes_on_with)}\n{run}"
    text = SITE.sub(lambda _: f"site={shlex.quote(site.name)}", text)
    return RUN.sub(lambda _: run, text)


def _asked(scheduler: str, job: Job, site: Site) -> list[str]:
    """Directives for nodes, ranks, cores, GPUs and time."""
    nodes, ranks, cores = job.nodes, job.ranks_per_node, job.cpus_per_rank
    gpus = None if any(GPUS in directive for directive in site.directives) else job.gpus_per_node
    if scheduler == "slurm":
        wanted = [f"--nodes={nodes}", f"--ntasks-per-node={ranks}", f"--cpus-per-task={cores}"]
        return [*wanted, f"--time={_clock(job.seconds)}", *([f"--gpus-per-node={gpus}"] if gpus else [])]
    if scheduler == "pbs":
        chunk = f"{nodes}:ncpus={ranks * cores}:mpiprocs={ranks}:ompthreads={cores}" + (
            f":ngpus={gpus}" if gpus else ""
        )
        return [f"-l select={chunk}", f"-l walltime={_clock(job.seconds)}"]
    minutes = math.ceil(job.seconds / 60)
    wanted = [f"-n {nodes * ranks}", f'-R "span[ptile={ranks}]"', f'-R "affinity[core({cores})]"']
    return [*wanted, f"-W {minutes // 60}:{minutes % 60:02d}", *([f'-gpu "num={gpus}"'] if gpus else [])]


def _named(scheduler: str, job: Job) -> list[str]:
    """Directives for name, account and partition."""
    name, account, partition = {
        "slurm": ("--job-name=", "--account=", "--partition="),
        "pbs": ("-N ", "-A ", "-q "),
        "lsf": ("-J ", "-P ", "-q "),
    }[scheduler]
    given = ((name, job.name), (account, job.account), (partition, job.partition))
    return [option + value for option, value in given if value is not None]


def _key(scheduler: str, directive: str) -> str:
    """What a directive is about: two with the same key replace each other."""
    if scheduler == "slurm":
        option = re.split(r"[=\s]", directive, maxsplit=1)[0]
        if not option.startswith("--"):  # -N2 and -N 2
            option = SHORT.get(option[:2], option[:2])
        return option
    option, _, value = directive.partition(" ")
    about = re.search(r"\w+", value)
    return f"{option} {about[0]}" if option in SEVERAL[scheduler] and about is not None else option


def _filled(site: Site, job: Job) -> list[str]:
    """The site's directives; those about GPUs only if some are asked for."""
    words = {
        "{nodes}": job.nodes,
        "{ranks}": job.nodes * job.ranks_per_node,
        "{ranks_per_node}": job.ranks_per_node,
        "{cpus_per_rank}": job.cpus_per_rank,
        GPUS: job.gpus_per_node,
    }
    filled = []
    for directive in site.directives:
        if job.gpus_per_node is None and GPUS in directive:
            continue
        for word, value in words.items():
            directive = directive.replace(word, str(value))
        filled.append(directive)
    return filled


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, as all but LSF take them."""
    whole = math.ceil(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


# The command


def submit(arguments: Sequence[str], checkout: Path = CHECKOUT) -> str:
    """Renders and submits a job, and tells how to watch it.

    Args:
        arguments: words of the command; those behind ``--`` are for the trainer.
        checkout: the source tree with jobs/ in it.

    Returns:
        What to print.

    Raises:
        InputError: anything that would fail later, in the queue or in the job.
    """
    from hpc_kfac.training import config

    own, trainer = _split(arguments)
    folder = checkout / "jobs"
    if not (folder / "launch.sh").exists():
        raise InputError(
            f"the job templates are not beside the package: {folder} has no launch.sh; install the package in editable"
            " form from a checkout (bash env/install.sh)"
        )
    chosen = _site_parser().parse_known_args([word for word in own if word not in ("-h", "--help")])[0]
    site = read_site(folder / "sites", chosen.site) if chosen.site is not None else None
    given = _parser().parse_args([*(site.defaults if site is not None else ()), *own])
    assert site is not None  # the parser has refused a command without one
    run = _run_file(given.run, checkout)
    settings = config.parse([str(checkout / run), *trainer])
    job = Job(
        name=_job_name(given.name or settings.name),
        run=(run, *trainer),
        nodes=given.nodes,
        ranks_per_node=given.ranks_per_node,
        cpus_per_rank=given.cpus_per_rank,
        seconds=_limit(given.time),
        gpus_per_node=given.gpus_per_node,
        account=given.account,
        partition=given.partition,
        goes_on_with=os.environ.get("HPC_KFAC_NAME"),
    )
    helpers = settings.helpers
    if helpers >= job.nodes * job.ranks_per_node:
        raise InputError(f"placement.helpers is {helpers} with {job.nodes * job.ranks_per_node} rank(s); ask for more")
    scheduler = SCHEDULERS[site.scheduler]
    script = render((folder / scheduler.template).read_text(), site, job)
    if given.dry_run:
        return script.rstrip("\n")
    return _hand_over(script, site, job, checkout, Path(settings.run.run_dir))


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of submit and those of the trainer."""
    words = list(arguments)
    place = words.index("--") if "--" in words else len(words)
    trainer = words[place + 1 :]
    for word in trainer:
        if word.partition("=")[0] in OWN:
            raise InputError(
                f"{word.partition('=')[0]} cannot be given behind --: the job sets it, so that a job that starts again"
                " finds its run; name the job with --name before the --"
            )
    return words[:place], trainer


def _site_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--site", default=os.environ.get("HPC_KFAC_SITE"))
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hpc-kfac submit",
        usage="hpc-kfac submit RUN.yaml --site NAME --nodes N --time 4:00:00 [options] [-- --key value ...]",
        description="Fills in the job template of a site's scheduler and submits it; what follows -- is the trainer's.",
    )
    site = os.environ.get("HPC_KFAC_SITE")
    parser.add_argument("run", metavar="RUN.yaml", help="the run file")
    parser.add_argument("--site", required=site is None, default=site, help="a file of jobs/sites; or HPC_KFAC_SITE")
    parser.add_argument("--nodes", type=_count, default=1)
    parser.add_argument("--ranks-per-node", type=_count, default=1)
    parser.add_argument("--cpus-per-rank", type=_count, default=1)
    parser.add_argument("--gpus-per-node", type=_count)
    parser.add_argument("--time", required=True, help="limit of the job, such as 90m or 4:00:00")
    parser.add_argument("--account")
    parser.add_argument("--partition", help="or queue")
    parser.add_argument("--name", help="of the job; default: the run's")
    parser.add_argument("--dry-run", action="store_true", help="show the script and submit nothing")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; give 1 or more")
    return int(text)


def _limit(text: str) -> float:
    if re.fullmatch(r"[\d.]+", text):
        raise InputError(f"time limit {text!r} has no unit; write {text}m for minutes, or hours like 4:00:00")
    return parse_duration(text)


def _run_file(given: str, checkout: Path) -> str:
    """The run file as the job sees it, which starts in the checkout."""
    path = Path(given)
    if not path.exists() and not path.is_absolute() and (checkout / path).exists():
        return given
    path = path.absolute()
    return str(path.relative_to(checkout)) if path.is_relative_to(checkout) else str(path)


def _job_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
        raise InputError(f"job name {name!r}: use letters, digits, '_', '-' and '.', with a letter first (--name)")
    return name


def _hand_over(script: str, site: Site, job: Job, checkout: Path, run_dir: Path) -> str:
    scheduler = SCHEDULERS[site.scheduler]
    if shutil.which(scheduler.command[0]) is None:
        raise InputError(
            f"site {site.name} has the scheduler {site.scheduler}, but there is no {scheduler.command[0]} here; submit"
            " on a login node of it, or see the script with --dry-run"
        )
    (checkout / "logs").mkdir(exist_ok=True)
    path = checkout / "logs" / f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}{Path(scheduler.template).suffix}"
    path.write_text(script)
    command = [*scheduler.command, *([] if scheduler.from_stdin else [str(path.relative_to(checkout))])]
    try:
        done = subprocess.run(
            command, cwd=checkout, input=script if scheduler.from_stdin else "", capture_output=True, text=True,
            timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{command[0]} has not answered in {PATIENCE:g} s; look whether the job is there") from error
    found = re.search(scheduler.answer, done.stdout)
    if done.returncode != 0 or found is None:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").replace("\n", "\n  ")
        raise InputError(f"{shlex.join(command)} refused the job:\n  {said}\nThe script is {path}.")
    number = found[1]
    folder = run_dir / (job.goes_on_with or f"{job.name}-{number.partition('.')[0]}")
    return "\n".join(
        [
            f"Job {number} is submitted; its script is {path.relative_to(checkout)}.",
            f"Run folder: {folder}",
            f"Output:     tail -F {scheduler.output.format(name=job.name, job=number)}",
            f"Progress:   hpc-kfac status {folder}",
            f"End it:     {scheduler.cancel} {number}",
        ]
    )
