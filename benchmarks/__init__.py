"""One command per measured claim; ``python -m benchmarks`` runs them all."""

import os

# As in prmim: with spinning threads, times depend on other load.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Otherwise, messages of torch's profiler appear in the tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
