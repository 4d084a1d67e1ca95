"""Faces to other libraries; each module imports its library, so none is imported here."""
