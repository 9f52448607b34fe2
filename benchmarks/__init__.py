"""How fast `cloud` is, beside the other ways of running Python functions on one machine.

::

    python -m benchmarks             the short run: `cloud`, the standard library, and what else is installed
    python -m benchmarks --full      every peer, at full size
    python -m benchmarks --promises  what each promise of `cloud` costs

::

    __main__    the command line
      └─ runner     one process per (workload, system) and repeat, interleaved, with time limits
           └─ child     that process: opens the system, runs the workload, writes what it measured
                ├─ workloads   what is measured, each defined once
                ├─ systems     what is measured with it: `cloud` and its peers, an adapter each
                └─ functions   what the jobs run, the same for all
      ├─ results    medians, ratios to the best peer, whether the aims are met
      ├─ tables     the same for a terminal and for the page
      ├─ chart      the same as SVG
      └─ page       writes docs/explanation/performance.md
"""
