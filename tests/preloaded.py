"""What every rank of a world would do again, done once in the server that ranks are forked from."""

import os

os.environ.setdefault("JOBLIB_MULTIPROCESSING", "0")  # joblib would leave a named semaphore for every rank that is killed

import deepspeed.ops  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402,F401  (bf16 and ZeRO import it, and with it torch's compiler)
import engine_cases  # noqa: E402,F401
import matplotlib.pyplot  # noqa: E402,F401
import peft  # noqa: E402,F401
import setuptools  # noqa: E402,F401  (0.4 s a rank: DeepSpeed looks for a compiler by it)
import sklearn.datasets  # noqa: E402,F401

import ds_decoupled.entry  # noqa: E402,F401
import ds_decoupled.models.hugging_face  # noqa: E402,F401

deepspeed.ops.__compatible_ops__  # noqa: B018  (looks at the compilers, and remembers)
