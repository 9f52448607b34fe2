"""Calls that are pickled now and submitted later, perhaps by another process: those of crons."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cloud.client.arguments import pickle_call
from cloud.client.cloud import Cloud
from cloud.jobs import CRON_OPTIONS, JobOptions, split_options
from cloud.serialization import pickling
from cloud.serialization.functions import Function, function_name
from cloud.serialization.shared import size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def pickle_job(func: Callable[..., Any], reserved: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """A call of ``func()`` to be submitted later: (opaque bytes, its options).

    Raises:
        TypeError, ValueError: A reserved name is unknown here or has a bad value.
        SerializationError: The function cannot be pickled.
    """
    from cloud.engine.worker import surroundings

    kwargs = dict(reserved)
    options, _ = split_options(kwargs, accept=CRON_OPTIONS)
    if kwargs:
        raise TypeError(f"unknown options: {', '.join(sorted(kwargs))}")
    try:
        payload = pickling.dumps(func)
    except Exception as exc:
        from cloud.serialization.explain import cannot_pickle

        raise cannot_pickle("the function", func, exc) from exc
    arguments = pickle_call((), {}, None, plain=True, limit=0)
    job = (payload, function_name(func), False, arguments, surroundings.snapshot())
    return pickling.dumps_plain(job), options.as_dict()


def unpickle_job(payload: bytes) -> tuple[Function, bytes, tuple[Any, ...]]:
    """(function, arguments, surroundings of then) of ``pickle_job``."""
    content, name, reusable, arguments, context = pickling.loads(payload)
    return Function(content, name, reusable=reusable), arguments, context


def submit_pickled(cloud: Cloud, payload: bytes, options: Mapping[str, Any], label: str | None = None) -> int:
    """Submit a job of ``pickle_job`` with the surroundings of then; its jid."""
    function, arguments, context = unpickle_job(payload)
    given = JobOptions.from_dict(options)
    given.label = label
    backend = cloud.backend
    jid = backend.submit(function, arguments, given, context=pickling.dumps_plain(context))
    if backend.datalog is not None:
        backend.datalog.called(backend, jid, function, size_of(arguments))
    return jid


__all__ = ["pickle_job", "submit_pickled", "unpickle_job"]
