"""Color anime line art from a reference image: distributed diffusion training and serving."""

__version__ = "0.1.0"
