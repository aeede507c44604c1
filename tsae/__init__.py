"""The engine below tsae_utils, which it never imports."""
