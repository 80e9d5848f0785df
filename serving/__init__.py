"""The play service."""

import os

# How long libgomp's threads spin for each other before they sleep, read when torch is first imported. By default they
# spin for milliseconds: where anybody else wants their cores, or a container's quota ends, a pass of the model then takes
# seconds. This long they spin through the gaps between operations: as fast alone, three times as fast beside others.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
