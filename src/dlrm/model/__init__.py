"""The model of Naumov et al. 2019, one module for each box of its figure."""
