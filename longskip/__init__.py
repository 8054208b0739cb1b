"""longskip: text-to-image U-ViT diffusion transformers, from a CPU laptop to 8B parameters on a cluster."""

__version__ = "0.1.0"
