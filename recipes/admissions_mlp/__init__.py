"""Graduate Admissions: seven figures about an applicant, and the chance of being admitted."""

from lightning_stableaa.recipes.admissions_mlp.data import AdmissionsData
from lightning_stableaa.recipes.admissions_mlp.module import AdmissionsModule

__all__ = ["AdmissionsData", "AdmissionsModule"]
