"""Where attempts at jobs are run."""
