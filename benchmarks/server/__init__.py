"""How fast a `cloud` server is, beside other servers of jobs, on one machine.

::

    python -m benchmarks.server          a short run: what is installed
    python -m benchmarks.server --full   at full size, with a map of 1,000,000

::

    __main__    the command line
      └─ ..runner    one process per (workload, system) and repeat, interleaved, with time limits
           └─ child     that process: starts the servers of the system, runs the workload, ends them
                ├─ workloads   what is measured, each defined once
                │    └─ polls      many long polls, by sockets
                └─ systems     `cloud serve` and its peers, an adapter each, with what each keeps when the machine dies
                     └─ tasks      the same functions as Celery wants them
      ├─ tables   figures with ratios
      └─ page     writes docs/explanation/server-performance.md
"""
