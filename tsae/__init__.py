"""The engine below tsae_utils: text, activations, kernels, files. It never imports tsae_utils."""
