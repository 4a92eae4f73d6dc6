"""Load generator and benchmarks: figures with a script. Not part of the installed package; run from the project folder.

wire        one HTTP/1.1 connection on a raw socket
bodies      endless supplies of pre-encoded push requests
load        closed and open loops over many connections, and what they counted
procstat    CPU and memory of process trees, from /proc
server      a `queen-trio run` of its own for a benchmark, and a look into its PostgreSQL
baselines   what this machine does without queen: disk, bare hypercorn, PostgreSQL row by row
bench       all cells, a table, a JSON file           python -m perf.bench
producer    push against any URL                      python -m perf.producer
consumer    pop against any URL                       python -m perf.consumer
soak        mixed load for hours: what grows          python -m perf.soak
flat        whether it does: a line by least squares
settings    a setting of PostgreSQL: with it, without    python -m perf.settings
slow_reader a 64 KiB/s client beside other requests   python -m perf.slow_reader
"""
