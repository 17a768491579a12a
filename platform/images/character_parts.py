"""Names of the parts of a character, which label the pixels of synthetic drawings and name the regions of colorings."""

PARTS = ("other", "hair", "skin", "eyes", "clothes", "background")
"""The parts, by label. `other` are accessories, mouths and objects, and has no name in a coloring."""
