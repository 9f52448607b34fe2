"""joblib over this package's workers: ``parallel_config(backend="cloud")``.

::

    import cloud.joblib
    import joblib

    cloud.joblib.register()
    with joblib.parallel_config(backend="cloud", n_jobs=4):
        joblib.Parallel()(joblib.delayed(f)(i) for i in range(10))

Importing this module does not load joblib.
"""

from __future__ import annotations

__all__ = ["register", "shutdown"]


def register(*, make_default: bool = False) -> None:
    """Make the backend 'cloud' known to joblib. Idempotent.

    Args:
        make_default: Let ``Parallel`` use it wherever no other backend is asked for.

    Raises:
        UnsupportedOperation: joblib is not installed, or is older than 1.3.
    """
    try:
        from joblib.parallel import register_parallel_backend  # type: ignore[import-untyped]

        from cloud.joblib._backend import CloudBackend
    except ImportError as exc:
        from cloud.errors import UnsupportedOperation

        raise UnsupportedOperation(
            f"joblib cannot be used ({exc})", hint="pip install 'cloudcall[joblib]', which brings joblib 1.3 or newer."
        ) from exc
    register_parallel_backend("cloud", CloudBackend, make_default=make_default)


def shutdown() -> None:
    """End the workers that are kept for the next ``Parallel``. They start again with it. Idempotent."""
    import sys

    backend = sys.modules.get("cloud.joblib._backend")
    if backend is not None:
        backend.kept.shutdown()
