"""Write the pair of SAEs that the repository carries: figure 6's at k = 16, seed 0, in half precision.

    python testbed/export_saes.py     # after `make record NB=06`; trains them again where the cache lacks them
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "notebooks"))
from lab import LOOKUP, Arm, Lab, tu  # noqa: E402

K, SEED = 16, 0


def main() -> None:
    lab = Lab("fig6_pareto", "record")
    df = lab.read_csv()
    arms = {}
    for system, table in (("topk", {}), ("topk+lookup", LOOKUP)):
        row = df[(df.system == system) & (df.k == K) & (df.seed == SEED)].iloc[0]
        arms[system] = Arm(system, int(row.d_sae), K, float(row.lr), **table)
    evaluator = tu.Evaluator(lab.lm, lab.rows("heldout", lab.p.eval_tokens), lab.hook(lab.layer))
    rows = []
    for name, sae in lab.train_or_load(arms, lab.layer, SEED, lab.p.tokens).items():
        folder = tu.save(sae, HERE / "saes" / name, {"record": sae.record, "model_hash": lab.lm.fingerprint}, dtype=torch.float16)
        mib = sum(f.stat().st_size for f in folder.iterdir()) / 2**20
        rows.append({"sae": name, "mib": mib, **evaluator(tu.load(folder, lab.lm.device))})
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "saes" / "measured.csv", index=False, float_format="%.6g")
    print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
