"""Color anime line art from a reference image: distributed diffusion training and serving."""

__version__ = "0.2.0"
