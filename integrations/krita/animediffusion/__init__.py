"""A Krita plug-in that colors line art with an AnimeDiffusion server. Krita imports this package when it starts."""

from krita import Krita

from .extension import ColorLineArt

Krita.instance().addExtension(ColorLineArt(Krita.instance()))
