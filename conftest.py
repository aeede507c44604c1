"""Under pytest the notebooks run at profile `smoke` unless TSAE_PROFILE says otherwise."""

import os

os.environ.setdefault("TSAE_PROFILE", "smoke")
