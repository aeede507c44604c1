"""Rules of the claims: one module per notebook, one function per claim; see lab/claims.py."""
