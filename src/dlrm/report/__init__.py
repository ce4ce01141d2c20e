"""One HTML page about a RUN: what ``dlrm report`` writes."""
