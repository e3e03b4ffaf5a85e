"""What a run would do, and about what it would take, before anything is solved."""

from convexprune.runs.preview.make import preview, recipe_of
from convexprune.runs.preview.records import LayerPreview, Preview

__all__ = ["LayerPreview", "Preview", "preview", "recipe_of"]
