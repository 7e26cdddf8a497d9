"""What every rank of a world would do again, done once in the server that ranks are forked from."""

import deepspeed.ops
import engine_cases  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import setuptools  # noqa: F401  (0.4 s a rank: DeepSpeed looks for a compiler by it)
import sklearn.datasets  # noqa: F401

import ds_decoupled.entry  # noqa: F401
import ds_decoupled.models.hugging_face  # noqa: F401

deepspeed.ops.__compatible_ops__  # noqa: B018  (looks at the compilers, and remembers)
