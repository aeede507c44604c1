"""Rules of the notebook on one's own model."""

from __future__ import annotations

import numpy as np
from lab.claims import Evidence, Tables, rule
from lab.stats import bootstrap_interval


@rule("own-lookup")
def steering_is_as_strong(t: Tables) -> Evidence:
    """The difference of the median gains over the SAE's median gain."""
    one = t.main[(t.main.row == "steered") & (t.main.strength == 1)]
    gain = one.favoured - one.other_push
    sae, tsae = (gain[one.system == s].to_numpy() for s in ("topk", "topk+lookup"))

    def relative(a: np.ndarray, b: np.ndarray) -> float:
        return (np.median(a) - np.median(b)) / abs(np.median(b))

    text = f"{np.median(tsae):+.2f} against {np.median(sae):+.2f} nats; relative difference {{}}"
    return Evidence(bootstrap_interval(relative, tsae, sae), text, "+.2f")
