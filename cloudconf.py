"""Configuration of the cloud package.

Keep this file as ~/.cloud/cloudconf.py, or in the folder that the environment variable CLOUD_HOME names. It is
Python: values may be expressions. Names of your own begin with an underscore. A setting that is not here has its
default. An environment variable CLOUD_<SETTING>, such as CLOUD_NUM_PROCS, takes precedence over this file, and what
a program commits with cloud.config.commit() or passes as an argument over both.
"""

"""Account"""

# Number of the API key that identifies you to the server. None: no key, jobs run on this machine.
api_key = None

# Secret that belongs to api_key. A file that holds it should be readable by you alone.
api_secretkey = None

# Address of the server that runs the jobs, such as 'https://cloud.example.org:8000'. Empty: no server.
server_url = ""

# Start in the simulator, whatever key or server is configured.
use_simulator = False

"""Logging"""

# File that save_log writes; relative to the home folder.
log_filename = "cloud.log"

# Write the messages of the 'Cloud' logger to log_filename.
save_log = False

# Least severe messages that save_log writes: DEBUG, INFO, WARNING, ERROR or CRITICAL.
log_level = "DEBUG"

# Least severe messages printed to stderr: DEBUG, INFO, WARNING, ERROR or CRITICAL.
print_log_level = "ERROR"

# Write a report of what was serialized for each job, with its output, under serialize_logging_path.
serialize_logging = False

# Folder of those reports; relative to the home folder.
serialize_logging_path = "datalogs/"

# Days after which those reports are deleted. 0: never.
purge_days = 7

"""Multiprocessing"""

# Worker processes, so the number of jobs that run at once on this machine. 0: one per usable core.
num_procs = 0

# Capture what jobs write to stdout and stderr, for cloud.info. False: it goes to the terminal.
redirect_job_output = True

# Finished jobs that are remembered; the oldest are forgotten first. 0: all of them.
mp_cache_size_limit = 0

# Bytes kept of each job's stdout, and as many of its stderr; the last ones are kept.
output_limit_bytes = 64000

# Seconds a killed job has to run its 'finally' blocks before its process is ended.
kill_grace_s = 0.5

# Depth to which jobs may start jobs that start jobs. 0: jobs may start none.
max_nesting = 100

"""Simulation"""

# Turn serialize_logging on in the simulator.
force_serialize_logging = True

# Turn redirect_job_output on in the simulator.
force_redirect_job_output = True

"""Transport"""

# Bytes one function or argument may have when serialized. 0: no limit.
max_transmit_data = 0

# Send a server those of your own modules that your jobs import. False: it must have them.
automatic_dependency_transfer = True

# Names of the modules and packages that may be sent, separated by blanks. Empty: all of your own.
dependency_whitelist = ""

# Seconds for which a request to a server that does not answer is tried again.
server_patience_s = 600.0

# File of certificates, PEM, by which the server is known. Empty: those of the system.
server_ca_file = ""

# Allow http:// to another machine. Whoever sees the traffic can then read and change everything.
insecure_server = False
