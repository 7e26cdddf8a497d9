"""One thread a process, as everywhere in the tests: results are compared to the bit."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# TorchInductor would start processes in every process that compiles, each of which imports torch first: to compile side by
# side, and to see whether the CPU's vector instructions can be used.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Another ninja than the environment's own, which the launcher's processes find, would compile the extension again.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# DeepSpeed's compiled extension, for this environment alone; a lock here was left by a killed run.
extensions = Path(sys.prefix) / "torch_extensions"
os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker's neighbour may be compiling
    for lock in extensions.glob("*/lock"):
        lock.unlink(missing_ok=True)
    if not [*extensions.glob("*/*.so")]:
        # Here and not in the first test: a rank that is killed while it compiles, because its world has run out of time on a
        # busy machine, leaves a lock that every later one waits for without end (torch.utils.file_baton).
        print("compiling DeepSpeed's extension, once in this environment ...", flush=True)
        subprocess.run([sys.executable, "-c", "from deepspeed.comm.torch import build_shm_op; build_shm_op()"], check=True,
                       stdout=subprocess.DEVNULL)
# The helpers beside this file, and what recipes are made of: here, in the server that ranks are forked from, and in scripts.
PATHS = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "recipes")]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])

from ds_decoupled.threads import share_cores  # noqa: E402

share_cores(tell=False)  # how processes wait that a test gives more threads

import torch  # noqa: E402

torch.set_num_threads(1)
