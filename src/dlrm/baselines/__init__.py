"""Models that a DLRM has to beat: trained on the same DATASET, measured on the same rows."""
