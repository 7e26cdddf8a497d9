"""The README's main job beside other programs that keep cores busy: seconds an update, by how its threads wait.

    python recipes/busy_neighbour.py              petra and backprop, P = 1 and 2, beside no, one and two busy programs
    python recipes/busy_neighbour.py --quick      one round of one update each, as a check that all of it runs

Ways to start the same job:

- ``default``: as torch is without anybody's word: a thread a core, shared among the ranks, which waits by spinning;
- ``shared``: as the recipes start it (:mod:`ds_decoupled.threads`): the same number of threads, which wait without spinning;
- ``pinned``: the same, and each rank stays on its share of the cores, as with ``deepspeed --bind_cores_to_rank`` (which needs
  numactl; the pinning is done here without it); on several ranks alone;
- ``brief spin``: as ``shared``, but a thread spins a thousand turns before it sleeps;
- ``one thread`` in each rank, which waits for nobody.

All ways of one job are alive at once and take turns, round by round; the busy programs are loops that this script starts and
stops. Data lie in memory, and what is timed is the steady state.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import json
import math
import multiprocessing as mp
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
import torch.distributed as dist
from bench_report import environment, table
from options import whole
from places import check_file
from torch import nn
from tqdm import tqdm

import ds_decoupled
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import build_model
from ds_decoupled.threads import THREADS, WAITING, settings, usable_cores

CONFIGS = Path(__file__).parent.parent / "ds_configs"
WAYS = ("default", "shared", "pinned", "brief spin", "one thread")
ANSWER_SECONDS = 600


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of_images = sorted(path.stem for path in CONFIGS.glob("*.json") if not path.stem.endswith("_lm"))
    parser.add_argument("--methods", nargs="+", default=["petra", "backprop"], choices=of_images, metavar="METHOD",
                        help="whose JSON stands in ds_configs (default: petra backprop)")
    parser.add_argument("--ranks", type=whole(1), nargs="+", default=[1, 2], help="pipeline ranks P (default: 1 2)")
    parser.add_argument("--neighbours", type=whole(0, 1000), nargs="+", default=[0, 1, 2],
                        help="busy programs beside the job (default: 0 1 2)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY",
                        help=f"of {', '.join(WAYS)} (default: all)")
    parser.add_argument("--width", type=whole(1, 10_000), default=16, help="channels of the first group (default: 16)")
    parser.add_argument("--image_size", type=whole(8, 10_000), default=16, help="pixels a side (default: 16)")
    parser.add_argument("--rounds", type=whole(1), default=3, help="of which the median is shown (default: 3)")
    parser.add_argument("--seconds", type=whole(0, 1000), default=1, help="about so many a timing (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/busy_neighbour.json"), help="numbers (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of one update each, of a smaller model")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.seconds, args.width, args.image_size = 1, 0, 4, 8
    return args


@dataclass(frozen=True)
class Job:
    """What is trained, by how many processes, and how they are started."""

    method: str
    ranks: int
    way: str
    width: int
    image_size: int


def jobs_of(args: argparse.Namespace, method: str, ranks: int, cores: int) -> list[Job]:
    """One for each way that makes a difference for so many ranks."""
    same = {"pinned"} if ranks == 1 or ranks > cores else set()
    if cores // ranks <= 1:  # a thread a rank, which waits for nobody
        same |= {"brief spin", "one thread"}
    return [Job(method, ranks, way, args.width, args.image_size) for way in args.ways if way not in same]


def variables(way: str, ranks: int, cores: int) -> dict[str, str]:
    """What the environment says of threads."""
    if way == "default":
        return {}
    if way == "one thread":
        return {THREADS: "1"}
    said = {"GOMP_SPINCOUNT": "1000"} if way == "brief spin" else {}
    return said | settings({"LOCAL_SIZE": str(ranks), **said}, cores)


@contextmanager
def said_of_threads(values: dict[str, str]) -> Iterator[None]:
    """Within, the environment says this of threads and nothing else: what is started inherits it."""
    names = (THREADS, *WAITING)
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


# -- one rank ----------------------------------------------------------------------------------------------------------------

def rank_main(pipe: Connection, job: Job, rank: int, port: int, log: str) -> None:
    """Entry of a rank's process: build, fill the pipeline, then time so many updates whenever it is told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.ranks), LOCAL_SIZE=str(job.ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if job.way == "default":  # nobody has shared the cores: each rank would take them all, slower still
        torch.set_num_threads(max(1, torch.get_num_threads() // job.ranks))
    if job.way == "pinned":
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // job.ranks
        os.sched_setaffinity(0, cores[rank * share:(rank + 1) * share])
    try:
        serve(pipe, job)
    except EOFError:  # the parent has let go
        pass
    except BaseException as error:
        with suppress(OSError):
            pipe.send({"error": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"})
    os._exit(0)  # no destructor waits for the other ranks


def serve(pipe: Connection, job: Job) -> None:
    """Obey a number of updates at a time."""
    config = json.loads((CONFIGS / f"{job.method}.json").read_text())
    config["optimizer"]["params"]["lr"] = 1e-5  # random labels lead nowhere
    layers = build_model("revnet18", data="cifar10", num_classes=10, width=job.width)
    module = ds_decoupled.DecoupledPipelineModule(layers, config=config, loss_fn=nn.CrossEntropyLoss(), base_seed=0)
    engine, *_ = ds_decoupled.initialize(model=module, config=config, model_parameters=list(module.parameters()))
    samples = config["train_micro_batch_size_per_gpu"]
    batch = torch.randn(samples, 3, job.image_size, job.image_size), torch.randint(10, (samples,))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield batch

    data = batches()
    warm_up = math.ceil(2 * len(layers) / engine.gradient_accumulation_steps()) + 1  # as deep as any pipeline here
    for _ in range(warm_up):
        engine.train_batch(data)
    pipe.send({"threads": torch.get_num_threads()})
    while True:
        updates = pipe.recv()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(updates):
            engine.train_batch(data)
        pipe.send({"start": start, "end": time.perf_counter()})  # one clock for all processes


# -- the job's world -----------------------------------------------------------------------------------------------------------

class Failed(Exception):
    """A rank has failed or does not answer."""


class World:
    """The job's processes, asleep but for the timings."""

    def __init__(self, job: Job, folder: Path, cores: int) -> None:
        context = mp.get_context("spawn")  # OpenMP reads its variables in every process anew
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = int(s.getsockname()[1])
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        self.seconds = 0.0  # an update, when it was timed last
        with said_of_threads(variables(job.way, job.ranks, cores)):
            for rank in range(job.ranks):
                here, there = context.Pipe()
                log = tempfile.mkstemp(dir=folder, suffix=f"-rank{rank}.log")[1]
                process = context.Process(target=rank_main, args=(there, job, rank, port, log), daemon=True)
                process.start()
                there.close()
                self.pipes.append(here)
                self.processes.append(process)

    def answers(self) -> list[dict[str, Any]]:
        """One of each rank."""
        found = []
        for pipe in self.pipes:
            try:
                if not pipe.poll(ANSWER_SECONDS):
                    raise Failed(f"no answer within {ANSWER_SECONDS} s")
                answer = pipe.recv()
            except (EOFError, OSError) as error:
                raise Failed(f"a rank is gone ({error!r})") from error
            if "error" in answer:
                raise Failed(answer["error"])
            found.append(answer)
        return found

    def time(self, seconds: float) -> float:
        """Seconds an update, of as many as take about ``seconds``."""
        updates = max(1, round(seconds / self.seconds)) if self.seconds else 1
        for pipe in self.pipes:
            pipe.send(updates)
        told = self.answers()
        self.seconds = (max(t["end"] for t in told) - min(t["start"] for t in told)) / updates
        return self.seconds

    def end(self) -> None:
        for process, pipe in zip(self.processes, self.pipes):
            pipe.close()
            process.kill()
        for process in self.processes:
            process.join(10)


@contextmanager
def neighbours(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Within, ``count`` programs keep a core busy each; they end with this process, however it ends."""
    loop = f"import os\nwhile os.getppid() == {os.getpid()}:\n    sum(range(100_000))"
    started = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        if started:
            time.sleep(0.5)  # they are under way
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


@dataclass
class Timed:
    """A job, the threads that each of its ranks has, and seconds an update by the number of neighbours, one a round."""

    job: Job
    threads: int
    seconds: dict[int, list[float]]


def measure(args: argparse.Namespace, jobs: list[Job], cores: int, bar: Any) -> list[Timed]:
    """Start a world for each of ``jobs`` and time them in turns."""
    found: list[Timed] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="busy-neighbour-")))
        worlds: list[World] = []
        for job in jobs:  # one after the other: starting is no part of this
            world = World(job, folder, cores)
            stack.callback(world.end)
            worlds.append(world)
            found.append(Timed(job, world.answers()[0]["threads"], {count: [] for count in args.neighbours}))
            world.time(0)
        for _ in range(args.rounds):
            for count in args.neighbours:
                with neighbours(count):
                    for timed, world in zip(found, worlds):
                        job = timed.job
                        bar.set_postfix_str(f"{job.method}, P={job.ranks}, {job.way}, {count} beside")
                        timed.seconds[count].append(world.time(args.seconds))
                        bar.update()
    return found


def report(args: argparse.Namespace, found: list[Timed]) -> str:
    """A row a job and way: medians over the rounds."""
    heads = ["alone" if count == 0 else f"beside {count}" for count in args.neighbours]
    rows = [[timed.job.method, str(timed.job.ranks), timed.job.way, str(timed.threads),
             *(f"{median(timed.seconds[count]):.3f}" for count in args.neighbours)] for timed in found]
    return table(["method", "P", "way", "threads a rank", *(f"s an update, {head}" for head in heads)], rows)


def main(arguments: list[str] | None = None) -> None:
    """Time, print, write."""
    args = parse_arguments(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    cores = usable_cores()
    found: list[Timed] = []
    try:
        check_file("--output", args.output)
        grid = [jobs_of(args, method, ranks, cores) for method in args.methods for ranks in args.ranks]
        with tqdm(total=sum(map(len, grid)) * args.rounds * len(args.neighbours), unit="timing") as bar:
            for jobs in grid:
                found += measure(args, jobs, cores, bar)
    except (ConfigError, Failed) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    facts = environment()
    print(f"\nrevnet18 at width {args.width}, {args.image_size} x {args.image_size} images, k and micro-batch of ds_configs; "
          f"medians of {args.rounds} rounds\n\n{facts['date']}, {cores} cores of {facts['cpu']}, torch {facts['torch']}, "
          f"DeepSpeed {facts['deepspeed']}\n\n    {facts['command']}\n\n{report(args, found)}")
    common.write_json(args.output, {"environment": facts, "measured": [asdict(timed) for timed in found]})
    print(f"\nnumbers: {args.output}")


if __name__ == "__main__":
    main()
