"""The functions that the jobs run, as tasks of Celery: its workers import this module."""

from __future__ import annotations

import os

from celery import Celery

from benchmarks import functions
from benchmarks.server import jobs

url = os.environ["BENCHMARK_REDIS_URL"]
app = Celery("benchmarks", broker=url, backend=url)
# For bytes: its JSON takes them as text, a third longer.
app.conf.update(task_serializer="pickle", result_serializer="pickle", accept_content=["pickle"])

TASKS = {
    function.__name__: app.task(function, name=function.__name__)
    for function in (functions.noop, functions.length, jobs.content)
}
