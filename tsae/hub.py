"""Download a saved SAE from the Hugging Face hub, and upload one with its model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsae.saelens import FILES, read_cfg, save

CARD = """---
{license}
library_name: sae_lens
tags: [sparse-autoencoder, interpretability]
---
# {title}

Trained {with_or_without} a per-token lookup table
([Dooms and Wilhelm, 2025](https://arxiv.org/abs/2502.17332)).

| | |
|---|---|
{facts}

```python
import tsae_utils as tu

sae = tu.from_pretrained("this repository")
```
SAELens loads the folder too{reservation}.
"""


def download(name_or_folder: str | Path, subfolder: str = "", revision: str | None = None) -> Path:
    """A local folder, or that of a hub repository through the Hugging Face cache.

    Raises FileNotFoundError where neither is there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    local = Path(name_or_folder).expanduser()
    if local.is_dir():
        return local / subfolder
    wanted = [f"{subfolder}/{file}" if subfolder else file for file in FILES]
    try:
        folder = snapshot_download(str(name_or_folder), revision=revision, allow_patterns=wanted)
    except (OSError, HTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name_or_folder}: no such folder, and the hub did not give {', '.join(wanted)}: "
            f"check name and network, or give a local copy ({type(error).__name__})"
        ) from error
    return Path(folder) / subfolder


def model_card(sae: Any, folder: str | Path = "", license: str = "") -> str:
    """README of a hub repository: what the SAE is and how to load it.

    `folder`, where it is saved, adds its held-out numbers.
    """
    cfg, has_table = sae.cfg, sae.lookup is not None
    facts = {
        "model": cfg.model_name,
        "hook point": cfg.hook_name,
        "context": cfg.context_size,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "activation": cfg.activation,
        "k": cfg.k if "topk" in cfg.activation else "",
        "lookup table": f"{len(sae.lookup.W):,} tokens" if has_table else "none",
    }
    if folder:
        heldout = read_cfg(folder)["metadata"].get("tokenized", {}).get("heldout", {})
        facts |= {f"held-out {name}": f"{value:.4g}" for name, value in heldout.items()}
    return CARD.format(
        license=license and f"license: {license}",
        title="Tokenized sparse autoencoder" if has_table else "Sparse autoencoder",
        with_or_without="with" if has_table else "without",
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items() if value != ""),
        reservation=" after `import tsae.saelens_classes`" if has_table else "",
    )


def push_to_hub(
    sae: Any,
    repo_id: str,
    private: bool = True,
    metadata: Mapping | None = None,
    revision: str | None = None,
    license: str = "",
) -> str:
    """Upload an SAE and its model card; returns the address.

    Your own token must be set (`hf auth login`). `metadata` must be JSON; its "heldout" shows on
    the card. Raises huggingface_hub's errors (OSError) where the hub refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = save(sae, Path(temporary) / "sae", metadata)
        (folder / "README.md").write_text(model_card(sae, folder, license))
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        address = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Add SAE"
        )
    return str(address)
