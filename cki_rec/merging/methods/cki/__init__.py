"""CKI, the paper's method: assessment, local gates, and the mixing weights of both."""

from cki_rec.merging.methods.cki.method import cki

__all__ = ["cki"]
