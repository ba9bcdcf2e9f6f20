"""Ray: placement, supervised worker processes, waiting with deadlines, shutdown. The only package that imports ray.

Ray reads these settings once, when it is imported: it authenticates with a token, and reports nothing to anyone.
"""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
