"""Conversion: from a model to a verified artifact, and from an artifact to another target."""
