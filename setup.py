"""Build and installation of the distribution `cloudcall`, which is imported as `cloud`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """Read ``__version__`` from the package without importing it: its dependencies may not be there yet."""
    source = (HERE / "cloud" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__\b[^=\n]*=\s*"([^"]+)"', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('cloud/__init__.py has no line of the form  __version__ = "1.2.3"')
    return found[1]


JOBLIB = ["joblib>=1.3"]
PROGRESS = ["tqdm>=4.60"]
SERVER = ["aiohttp>=3.11", "fastjsonschema>=2.20", "uvloop>=0.19; sys_platform != 'win32'"]

setup(
    name="cloudcall",
    version=version(),
    description="PiCloud's API as self-hosted software: cloud.call(f, x), cloud.result(jid)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["cloud", "cloud.*"]),
    # Makes an editable install one plain path; without it, every interpreter start would load an import hook.
    package_dir={"": "."},
    package_data={"cloud": ["py.typed"]},
    # Older releases of croniter refuse some possible schedules, and those of filelock fail in a forked child.
    install_requires=[
        "cloudpickle>=3.1",
        "croniter>=7.0",
        "filelock>=3.30",
    ],
    extras_require={
        # What `make bench-full` and `make bench-server-full` compare with; they measure whatever of it is there.
        "bench": [
            "celery>=5.7",
            "dask[distributed]>=2026.1",
            "executorlib>=1.11",
            "joblib>=1.5",
            "loky>=3.5",
            "mpire>=2.10",
            "numpy>=1.26",
            "ray>=2.50",
            "redis>=8.0",
            "rq>=3.0",
        ],
        "joblib": JOBLIB,
        "progress": PROGRESS,
        # What `cloud serve` needs; its clients need none of it.
        "server": SERVER,
        "test": [
            *JOBLIB,
            *PROGRESS,
            *SERVER,
            "coverage>=7.10",
            # Programs that tests/dropin runs on our pools.
            "emcee>=3.1",
            "hypothesis>=6.100",
            # The linters are held to one series: a new rule must not fail a checkout that nobody touched.
            "mypy>=2.4,<2.5",
            "numpy>=1.26",
            "psutil>=5.9",
            "pytest>=8.0",
            "pytest-timeout>=2.2",
            "ruff>=0.17,<0.18",
            "scikit-learn>=1.4",
            # Only where everything is run.
            "schemathesis>=4.0; python_version < '3.12'",
            "scipy>=1.11",
        ],
    },
    entry_points={"console_scripts": ["cloud = cloud.cli:main"]},
    keywords=["parallel", "distributed", "jobs", "multiprocessing", "picloud"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
