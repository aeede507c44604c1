"""Progress bars as text, for terminals and saved notebooks; to be imported before tqdm.auto."""

from __future__ import annotations

import os
import warnings

if os.environ.get("TSAE_TEXT_PROGRESS"):  # set by tools/run_notebooks.py
    import tqdm.notebook

    tqdm.notebook.IProgress = None
    warnings.filterwarnings("ignore", message="IProgress not found")
