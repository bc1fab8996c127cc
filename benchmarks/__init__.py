"""One command per measured claim; ``python -m benchmarks`` runs them all."""

import os

# As in prmim: spinning threads would make times depend on other load.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Keep messages of torch's profiler out of the tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
