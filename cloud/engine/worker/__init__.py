"""What runs inside a worker: the loop, the run of one job, output capture, the job's surroundings."""
