"""Write the repository's pair of SAEs: those of figure 6 at k = 16, seed 0, in half precision.

    python testbed/export_saes.py     # after `make record NB=06`

SAEs that the cache lacks are trained again.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from notebooks.lab import LOOKUP, Lab, SAESpec, tu

FOLDER = Path(__file__).resolve().parent / "saes"
K, SEED = 16, 0


def main() -> None:
    lab = Lab("fig6_pareto", "record")
    df = lab.read_csv()
    specs = {}
    for system, table in (("topk", {}), ("topk+lookup", LOOKUP)):
        row = df[(df.system == system) & (df.k == K) & (df.seed == SEED)].iloc[0]
        specs[system] = SAESpec(system, int(row.d_sae), K, float(row.lr), **table)
    heldout = lab.rows("heldout", lab.p.budget.eval_tokens)
    evaluator = tu.Evaluator(lab.lm, heldout, lab.hook(lab.layer))
    saes = lab.train_or_load(specs, lab.layer, SEED, lab.p.budget.tokens)
    rows = []
    for name, sae in saes.items():
        metadata = {"record": sae.record, "model_hash": lab.lm.fingerprint}
        folder = tu.save(sae, FOLDER / name, metadata, dtype=torch.float16)
        mib = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        rows.append({"sae": name, "mib": mib, **evaluator(tu.load(folder, lab.lm.device))})
    table = pd.DataFrame(rows)
    table.to_csv(FOLDER / "measured.csv", index=False, float_format="%.6g")
    print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
