"""The play service."""

import os

# How long libgomp's threads spin for each other before they sleep, read when torch is first imported. By default it is
# milliseconds: where others want the cores, or a container's quota ends, a pass of the model then takes seconds. This
# long lasts through the gaps between operations: as fast alone, three times as fast beside other work.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
