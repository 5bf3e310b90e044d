"""The one part that is compiled at an install; all else is in pyproject.toml.

A setup.py, because setuptools takes ext-modules in pyproject.toml as an experiment only, and the same for every
platform.
"""

import sys

from setuptools import Extension, setup

# Apple's and Microsoft's compilers do not come with OpenMP: without it the kernel runs on one thread. No -march: an
# environment may move to another processor, and loading from scattered places gains nothing by wider registers.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

setup(
    ext_modules=[
        Extension(
            "lift_ds.index.kernels._host",
            ["lift_ds/index/kernels/host_access.c"],
            extra_compile_args=["-O3", *OPENMP],
            extra_link_args=OPENMP,
            optional=True,  # without a C compiler, or its headers of Python, torch's operators are used
        )
    ]
)
